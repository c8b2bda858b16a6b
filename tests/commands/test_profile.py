"""Where a run's time goes: numbers by hand, advice with its reason, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.cli import main
from rlhf_exp.commands import profile as profile_module
from rlhf_exp.commands.profile import RunProfile, profiled
from rlhf_exp.hardware import MachineLimits
from rlhf_exp.models.architecture import Architecture
from tests.lab import small_config

SHAPE = Architecture("gpt_neox", 2, 32, 2, 128, 320, 192)
GIB = 1 << 30
CPU = MachineLimits("Fast 9000", {"float32": 1e9, "bfloat16": 1.2e9}, 1e9, 16 * GIB)
GPU = MachineLimits("G", {"float32": 1e9, "bfloat16": 1e9}, 1e9, 80 * GIB)
SLOW = MachineLimits("S", {"float32": 1e7, "bfloat16": 1e7}, 1e9, 80 * GIB)
ROW = {
    "time/rollout_s": 2.0,
    "time/score_s": 1.0,
    "time/assess_s": 0.5,
    "time/update_s": 4.0,
    "prompt/length_mean": 40.0,
    "response/length_mean": 6.0,
    "throughput/samples_per_s": 1.0,
    "memory/peak_bytes": 2.0 * GIB,
}
ON_GPU = ROW | {"memory/reserved_bytes": 3.0 * GIB}


def found(
    *overrides: str,
    limits: MachineLimits | None = CPU,
    shape: Architecture | None = SHAPE,
    row: dict[str, float] = ROW,
) -> RunProfile:
    config = small_config(Path("outputs"), "distributed.threads=null", *overrides)
    return profiled("run", config, [row], shape, limits)


def advised(*overrides: str, **settings: Any) -> dict[str, str]:
    return {one.override: one.reason for one in found(*overrides, **settings).advice}


def test_the_rest_of_an_iteration_is_what_no_phase_has() -> None:
    # 8 rollouts at one a second are 8 s, of which 7.5 s are timed.
    result = found()
    assert result.seconds == 8.0
    assert result.phase("rest").seconds == pytest.approx(0.5)
    assert result.sampled == 48.0


def test_the_least_time_is_that_of_the_limits() -> None:
    # The reward model: 8 rows of 46 tokens through 2 blocks of 12 D^2 weights, and 46 * 47 / 2
    # pairs a row of D numbers in two products: at 1e9 operations a second.
    scoring = found().phase("scoring")
    flops = 2 * (2 * 12 * 32**2 * 8 * 46 + 4 * 32 * 8 * 46 * 47 / 2)
    assert scoring.total.flops == flops
    assert scoring.least == pytest.approx(flops / 1e9)
    assert scoring.share_of_limit == pytest.approx(flops / 1e9 / 1.0)


def test_gpus_share_the_work_and_processes_of_a_processor_its_limits() -> None:
    one = found(row=ON_GPU, limits=GPU).phase("scoring")
    two = found("distributed=ddp", row=ON_GPU, limits=GPU).phase("scoring")
    assert (one.total.flops, one.least) == (two.total.flops, pytest.approx(2 * (two.least or 0)))
    on_cpu = found("distributed=ddp").phase("scoring")
    assert on_cpu.least == pytest.approx(found().phase("scoring").least)
    # A reward model on a GPU of its own has one device, whatever trains.
    alone = found("distributed=ddp", "ppo.reward.placement=gpu:2", row=ON_GPU, limits=GPU)
    assert alone.phase("scoring").least == pytest.approx(one.least)


def test_what_is_not_known_is_said() -> None:
    result = found(limits=None)
    assert result.phase("updating").least is None
    result = found(shape=None)
    assert result.notes == ("operations and bytes are not known of a model of this family",)
    assert result.phase("updating").work == {}
    row = {name: value for name, value in ROW.items() if name != "prompt/length_mean"}
    # 128 tokens of a row less 8 new ones.
    assert found(row=row).prompt == 120.0
    assert "120 are assumed" in found(row=row).notes[0]


def test_sampling_ahead_is_not_all_waited_for() -> None:
    ahead = ("ppo.generation.engine=vllm", "ppo.generation.ahead=1")
    assert "what updates wait for" in found(*ahead).notes[0]
    assert found().notes == ()


def test_bfloat16_is_advised_where_it_is_fast() -> None:
    fast = MachineLimits("Fast 9000", {"float32": 1e9, "bfloat16": 1.6e9}, 1e9, GIB)
    reason = advised(limits=fast)["distributed.precision=auto"]
    assert reason.startswith("Fast 9000 does 2 GFLOP/s in bfloat16, 1 in float32")
    assert "distributed.precision=auto" not in advised()
    assert "distributed.precision=auto" not in advised("model.dtype=bfloat16", limits=fast)


def test_more_rows_are_advised_where_sampling_reads_weights_for_few() -> None:
    slow = MachineLimits("M", {"float32": 1e12, "bfloat16": 1e12}, 1e6, 16 * GIB)
    reason = advised("ppo.generation.batch=2", limits=slow)["ppo.generation.batch=8"]
    assert reason.startswith("now 2; each step reads all weights")
    assert "ppo.generation.batch=8" not in advised("ppo.generation.batch=8", limits=slow)
    full = MachineLimits("M", slow.flops, slow.bandwidth, 2 * GIB)
    assert "ppo.generation.batch=8" not in advised("ppo.generation.batch=2", limits=full)
    quick = ROW | {"time/rollout_s": 0.1}
    assert "ppo.generation.batch=8" not in advised("ppo.generation.batch=2", limits=slow, row=quick)


def test_many_small_kernels_are_told_from_a_limit() -> None:
    fast = MachineLimits("G", {"float32": 1e12, "bfloat16": 1e12}, 1e12, 80 * GIB)
    name = "ppo.generation.engine=vllm"
    assert "many small kernels" in advised(row=ON_GPU, limits=fast)[name]
    assert name not in advised(limits=fast), "not of a processor"
    assert name not in advised(row=ON_GPU, limits=SLOW), "near its limit"


def test_scoring_that_all_wait_for() -> None:
    row = ON_GPU | {"time/score_s": 5.0}
    waits = ("distributed=ddp", "ppo.reward.placement=gpu:2")
    reason = advised(*waits, row=row, limits=GPU)["ppo.reward.placement=shared"]
    assert reason.startswith("one device scores for 5 s while 2 wait")
    assert "ppo.reward.placement=shared" not in advised("distributed=ddp", row=row, limits=GPU)
    assert "ppo.reward.placement=shared" not in advised(*waits, row=ON_GPU, limits=GPU)
    assert "reward.train_blocks=1" in advised("ppo.train_blocks=1", row=row, limits=GPU)
    assert "reward.train_blocks=1" not in advised(
        "ppo.train_blocks=1", "reward.train_blocks=1", row=row, limits=GPU
    )


def test_updates_of_few_rows() -> None:
    fast = MachineLimits("G", {"float32": 1e12, "bfloat16": 1e12}, 1e12, 80 * GIB)
    few = advised("ppo.micro_batch=1", row=ON_GPU, limits=fast)
    assert few["ppo.micro_batch=2"].startswith("now 1; passes of few rows reach 0% of the limit")
    assert not any(name.startswith("ppo.micro") for name in advised(row=ON_GPU, limits=fast))
    tight = MachineLimits("G", fast.flops, fast.bandwidth, 5 * GIB)
    assert "ppo.micro_batch=2" not in advised("ppo.micro_batch=1", row=ON_GPU, limits=tight)
    name = "ppo.gradient_checkpointing=false"
    assert name in advised("ppo.gradient_checkpointing=true", row=ON_GPU, limits=fast)
    assert name not in advised("ppo.gradient_checkpointing=true", row=ON_GPU, limits=tight)


def test_processes_of_a_processor_share_its_memory() -> None:
    """Two of 3 GiB leave less than half of 11 GiB free, and one leaves more."""
    row = ROW | {"memory/peak_bytes": 3.0 * GIB}
    shared = MachineLimits("M", {"float32": 1e12, "bfloat16": 1e12}, 1e6, 11 * GIB)
    name = "ppo.gradient_checkpointing=false"
    recomputes = "ppo.gradient_checkpointing=true"
    assert name in advised(recomputes, row=row, limits=shared)
    assert name not in advised(recomputes, "distributed=ddp", row=row, limits=shared)
    tight = MachineLimits("M", shared.flops, shared.bandwidth, 6 * GIB)
    few = "ppo.generation.batch=2"
    assert "ppo.generation.batch=8" in advised(few, row=row, limits=tight)
    assert "ppo.generation.batch=4" not in advised(few, "distributed=ddp", row=row, limits=tight)
    assert "ppo.generation.batch=4" in advised(few, "distributed=ddp", row=row, limits=shared)


def test_scoring_over_the_trunk_runs_all_above_it() -> None:
    """The reward model's blocks above the trunk, of which it may have trained fewer."""
    deep = Architecture("gpt_neox", 4, 32, 2, 128, 320, 192)

    def flops(*overrides: str) -> float:
        trained = ("ppo.train_blocks=2", "reward.train_blocks=1")
        return found(*trained, *overrides, shape=deep).phase("scoring").total.flops

    whole = flops("reward.train_blocks=null")
    assert flops() == pytest.approx(whole / 2)
    assert flops("ppo.reward.placement=gpu:1") == pytest.approx(whole), "no trunk there"
    several = "ppo.reward.terms=[{model: default}, {length: {target: 5}}]"
    assert flops(several) == pytest.approx(whole), "each reward is a model of its own"


def test_the_trunk_is_run_again_where_decoding_keeps_no_states() -> None:
    def trunk(*overrides: str) -> float:
        work = found("ppo.train_blocks=1", *overrides).phase("assessing").work
        return work["trunk"].flops

    assert trunk() == 0
    assert trunk("ppo.generation.engine=vllm") > 0
    assert trunk("ppo.generation.ahead=1") > 0


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "cpu_limits", lambda threads, width: CPU)
    monkeypatch.setattr(profile_module, "gpu_limits", lambda width: None)


@pytest.mark.usefixtures("limits")
def test_the_command_shows_a_run(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--outputs", str(small_run), "profile", "small", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in values["phases"]] == [
        *("sampling", "scoring", "assessing", "updating", "rest")
    ]
    assert sum(phase["seconds"] for phase in values["phases"]) == pytest.approx(values["seconds"])
    assert values["iterations"] == 2, "3, without the first"
    assert 0 < values["response"] <= 8
    assert main(["--outputs", str(small_run), "profile", "small"]) == 0
    shown = capsys.readouterr().out
    assert "limits of Fast 9000: 1 GFLOP/s in float32" in shown
    assert "updating: backward" in shown
    assert main(["--outputs", str(small_run), "profile", "small", "--device", "h200"]) == 0
    assert "limits of H200: 67000 GFLOP/s in float32" in capsys.readouterr().out


@pytest.mark.usefixtures("limits")
def test_a_run_in_progress_is_shown(
    run_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (done,) = (run_copy / "store" / "ppo").iterdir()
    unfinished = done.rename(run_copy / "left")
    monkeypatch.setattr(
        "rlhf_exp.store.store.Store.unfinished", lambda store, stage, key: unfinished
    )
    assert main(["--outputs", str(run_copy), "profile", "small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["iterations"] == 2
    (unfinished / "metrics.jsonl").write_text("")
    assert main(["--outputs", str(run_copy), "profile", "small"]) == 2
    assert "no iteration of its PPO is over yet" in capsys.readouterr().err


@pytest.mark.usefixtures("limits")
def test_errors_name_what_is_there(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--outputs", str(small_run), "profile", "small", "--device", "z80"]) == 2
    assert "expected one of a100-40gb, a100, h100, h200" in capsys.readouterr().err
