"""A probe: what it measures, and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.executor import executor_for
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.pipeline.probe import ProbeResult, probe, probe_table
from rlhf_exp.stages.probe import Recorder
from tests.lab import launch, small_config

GIB = 1 << 30


def files(folder: Path) -> dict[str, int]:
    """Return all files but Hydra's own, with a hash of their content."""
    return {
        str(path.relative_to(folder)): hash(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and "hydra" not in path.relative_to(folder).parts
    }


def probed(folder: Path, *overrides: str) -> tuple[list[ProbeResult], list[str]]:
    """Probe a small config; return what was measured, and what was said."""
    config, said = small_config(folder, *overrides), list[str]()
    executor = executor_for(config, None)
    try:
        found = list(probe(config, plan(config), executor, said.append))
    except BaseException as error:
        executor.end(error)
        raise
    executor.end(None)
    return found, said


def phase(name: str, seconds: float, host: int = 0, **metrics: float) -> dict[str, Any]:
    return {"name": name, "seconds": seconds, "host": host, "device": 0, "metrics": metrics}


def by_hand() -> ProbeResult:
    """A stage of 20 iterations of 4 steps."""
    phases = [
        phase("start", 7.0, 5 * GIB),
        phase("iteration", 9.0, 2 * GIB),
        phase("iteration", 3.0, 3 * GIB, **{"time/rollout_s": 1.25}),
        phase("evaluation", 2.0, 4 * GIB),
        phase("end", 1.0, 6 * GIB),
    ]
    return ProbeResult("ppo", 80, 20, 5, 4, [{"libraries": GIB, "phases": phases}])


def test_time_to_the_end_by_hand() -> None:
    # The start with the first evaluation, 20 iterations as the second one, which is warm, 4 more
    # evaluations, 4 checkpoints.
    assert by_hand().remaining == 7.0 + 20 * 3.0 + 4 * 2.0 + 4 * 1.0
    assert by_hand().peak("host", 0, "iteration", "evaluation") == 4 * GIB


def test_table_shows_plan_beside_measurement(tmp_path: Path) -> None:
    config = small_config(tmp_path, "stage=ppo")
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(probe_table(config, by_hand()))
    rows = {line[:44].strip(): line.split() for line in console.export_text().splitlines()}
    assert rows["host memory in training, GiB"][-2:] == ["0.009", "4.0"]
    assert rows["while loading"][-1] == "5.0"
    assert rows["sampling"][-2:] == ["1.25", "s"]
    assert any(row.startswith("to the end") for row in rows)


def test_two_iterations_of_ppo_leave_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path / "out", "probe=true", "stage=ppo") == 0
    shown = capfd.readouterr()
    assert "ppo, probed" in shown.out
    assert "sft, probed" not in shown.out
    assert "no reward model in the store" in shown.err
    assert "ppo (probe) 4/4" in shown.err  # two iterations of two steps each
    assert files(tmp_path / "out") == {}


def test_counts_of_the_whole_stage(tmp_path: Path) -> None:
    # 7 steps in iterations of 8 / 4 = 2 steps end after 8; evaluations before, after 4, 6 (past 6)
    # and at the end; checkpoints after 6 (past 5) and at the end.
    (found,), _ = probed(
        tmp_path,
        "stage=ppo",
        "ppo.steps=7",
        "ppo.eval_every=3",
        "ppo.checkpoint_every=5",
        "ppo.reward.delta=true",
    )
    counts = (found.steps, found.iterations, found.evaluations, found.checkpoints)
    assert counts == (8, 4, 4, 2)
    names = [one["name"] for one in found.processes[0]["phases"]]
    assert names == ["start", "iteration", "iteration", "evaluation", "end"]
    assert found.phases("iteration")[1]["metrics"]["time/rollout_s"] > 0.0


def test_started_workers_are_probed_and_share_stand_ins(tmp_path: Path) -> None:
    (found,), said = probed(tmp_path, "stage=reward", "distributed=ddp", "distributed.processes=2")
    assert [text.split()[1] for text in said if text.startswith("no ")] == ["sft", "reward"]
    assert len(found.processes) == 2
    assert len(found.phases("iteration", 1)) == 4
    assert found.peak("host", 1, "iteration") > found.processes[1]["libraries"] > 100 << 20
    assert files(tmp_path) == {}


def test_trained_models_are_used_and_the_store_stays(run_copy: Path) -> None:
    before = files(run_copy)
    (found,), said = probed(run_copy, "stage=ppo", "ppo.seed=5")
    assert found.stage == "ppo"
    assert said == ["ppo: probing"]
    assert files(run_copy) == before


def test_nothing_to_probe_where_all_is_given(run_copy: Path) -> None:
    (model,) = run_copy.glob("store/sft/*/model")
    with pytest.raises(UserError, match="nothing would train"):
        probed(run_copy, "stage=sft", f"sft.use={model}")


def test_each_phase_has_a_peak_of_its_own() -> None:
    recorder = Recorder()
    block = np.ones(25 << 20)  # 200 MiB
    recorder.log({"eval/loss": 1.0}, 0)
    del block
    recorder.log({"loss/total": 1.0}, 1)
    recorder.log({"loss/total": 1.0}, 2)
    start, freed, after = recorder.phases
    assert (start.name, freed.name) == ("start", "iteration")
    assert start.host - recorder.libraries > 190 << 20
    assert start.host - after.host > 190 << 20
