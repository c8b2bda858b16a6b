"""Work that is cut off, done twice at once, or done again."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.pipeline.plan import records_of
from rlhf_exp.stages import ppo as ppo_stage
from rlhf_exp.stages import sft as sft_stage
from rlhf_exp.store import publish
from rlhf_exp.store.run_records import RunRecord
from rlhf_exp.store.store import Store
from rlhf_exp.training.checkpoint import Checkpoints
from rlhf_exp.training.ppo import ExperienceCollector
from tests.judge_server import JudgeServer
from tests.lab import (
    LAUNCH,
    artifact,
    launch,
    put_other_weights,
    small,
    small_config,
    weights,
)

ITERATIONS = [0, 1, 2]
"""Of a small PPO run: 6 steps, two an iteration."""


class PowerCut(RuntimeError):
    """Ends a run in the middle."""


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends a run after so many checkpoints, or never again."""
    save, left = Checkpoints.save, [0]

    def cut(self: Checkpoints, *arguments: Any) -> Path:
        folder = save(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise PowerCut
        return folder

    def after(checkpoints: int) -> None:
        left[0] = checkpoints

    monkeypatch.setattr(Checkpoints, "save", cut)
    return after


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The PPO iterations that were run."""
    collect, seen = ExperienceCollector.collect, []

    def noted(self: ExperienceCollector, iteration: int, *arguments: Any) -> Any:
        seen.append(iteration)
        return collect(self, iteration, *arguments)

    monkeypatch.setattr(ExperienceCollector, "collect", noted)
    return seen


def record(outputs: Path) -> RunRecord:
    return records_of(small_config(outputs)).resolve("latest")


def test_a_redo_goes_on_where_it_was_cut_off(
    run_copy: Path, power_cut: Callable[[int], None], iterations: list[int]
) -> None:
    before = artifact(run_copy, "ppo")
    power_cut(1)
    with pytest.raises(PowerCut):
        launch(run_copy, "eval=none", "rerun=[ppo]")
    assert iterations == [0]
    assert record(run_copy).status == "failed"
    assert "PowerCut" in str(record(run_copy).error)

    # The old result is untouched, and serves all who do not ask for a new one.
    assert launch(run_copy) == 0
    assert artifact(run_copy, "ppo").manifest == before.manifest
    assert iterations == [0]

    assert launch(run_copy, "eval=none", "rerun=[ppo]") == 0
    assert iterations == ITERATIONS
    after = artifact(run_copy, "ppo")
    assert after.manifest.created > before.manifest.created
    assert weights(after) == weights(before), "the same computation, cut off or not"
    assert after.manifest.duration_s > 0


def test_a_cut_off_run_goes_on_with_the_code_it_began_with_or_not_at_all(
    run_copy: Path,
    power_cut: Callable[[int], None],
    iterations: list[int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    power_cut(1)
    with pytest.raises(PowerCut):
        launch(run_copy, "eval=none", "ppo.kl.coef=0.3")
    (note,) = (run_copy / "store" / ".staging").glob("ppo-*/.started.json")
    begun = json.loads(note.read_text())
    begun["code"]["rlhf_exp/algo/advantages.py"] = "other"
    note.write_text(json.dumps(begun))
    assert launch(run_copy, "eval=none", "ppo.kl.coef=0.3") == 2
    message = capfd.readouterr().err
    assert "rlhf_exp/algo/advantages.py" in message
    assert "rerun=[ppo]" in message
    assert launch(run_copy, "eval=none", "ppo.kl.coef=0.3", "rerun=[ppo]") == 0
    assert iterations == [0, *ITERATIONS], "from the beginning"


def test_a_run_finished_by_other_code_is_known_as_such(
    run_copy: Path, power_cut: Callable[[int], None], iterations: list[int]
) -> None:
    power_cut(1)
    with pytest.raises(PowerCut):
        launch(run_copy, "eval=none", "ppo.kl.coef=0.3")
    (note,) = (run_copy / "store" / ".staging").glob("ppo-*/.started.json")
    begun = json.loads(note.read_text())
    begun["code"]["rlhf_exp/algo/advantages.py"] = "other"
    note.write_text(json.dumps(begun))
    assert launch(run_copy, "eval=none", "ppo.kl.coef=0.3", "cache=trust") == 0
    assert iterations == ITERATIONS
    assert launch(run_copy, "eval=none", "ppo.kl.coef=0.3") == 2, "half of it is of the old code"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A disk that is full while publishing, until its only item is set to False."""
    full, rename = [True], publish._rename

    def stops(*arguments: Any) -> Any:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(*arguments)

    monkeypatch.setattr(publish, "_rename", stops)
    return full


def test_a_full_disk_while_publishing_costs_no_training(
    tmp_path: Path,
    full_disk: list[bool],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert launch(tmp_path, "stage=sft") == 2
    message = capfd.readouterr().err
    assert "publishing sft" in message
    assert "needed" in message
    assert "publishes without training again" in message
    assert "Traceback" not in message
    assert not list((tmp_path / "store").glob("sft/*"))
    full_disk[0] = False
    monkeypatch.setattr(sft_stage, "run", lambda *_: pytest.fail("trained again"))
    assert launch(tmp_path, "stage=sft") == 0
    artifact(tmp_path, "sft").verify()
    assert not list(artifact(tmp_path, "sft").path.rglob("checkpoints"))


def test_a_cut_off_publication_of_other_code_does_not_pass(
    tmp_path: Path, full_disk: list[bool], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "stage=sft") == 2
    full_disk[0] = False
    (note,) = (tmp_path / "store" / ".staging").glob("sft-*.publish.json")
    content = json.loads(note.read_text())
    content["manifest"]["code"]["rlhf_exp/algo/losses.py"] = "other"
    note.write_text(json.dumps(content))
    capfd.readouterr()
    assert launch(tmp_path, "stage=sft") == 2
    assert "rlhf_exp/algo/losses.py" in capfd.readouterr().err


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    run_copy: Path,
    power_cut: Callable[[int], None],
    iterations: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = artifact(run_copy, "ppo")
    power_cut(2)
    with pytest.raises(PowerCut):
        launch(run_copy, "eval=none", "rerun=[ppo]")
    newest = max((run_copy / "store" / ".staging").glob("ppo-*/checkpoints/step-*"))
    content = bytearray((newest / "trainable.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "trainable.safetensors").write_bytes(content)
    assert launch(run_copy, "eval=none", "rerun=[ppo]") == 0
    assert f"{newest} is damaged" in caplog.text
    assert "falling back to the one before it" in caplog.text
    assert iterations == [0, 1, 1, 2]
    again = artifact(run_copy, "ppo")
    assert weights(again) == weights(whole)
    rows = [json.loads(line) for line in (again.path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["global_step"] for row in rows if "loss/total" in row]
    assert steps == [2, 4, 6], "the rows after the older checkpoint were made again"


def ctrl_c(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> list[int]:
    """Press Ctrl-C in the middle of PPO iteration `at`; return the list of iterations run."""
    collect, seen = ExperienceCollector.collect, []

    def pressed(self: ExperienceCollector, iteration: int, *arguments: Any) -> Any:
        seen.append(iteration)
        if seen == list(range(at + 1)):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return collect(self, iteration, *arguments)

    monkeypatch.setattr(ExperienceCollector, "collect", pressed)
    return seen


def test_ctrl_c_saves_and_leaves(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Checkpoints only on demand: what is saved is what Ctrl-C saves.
    command = ["eval=none", "rerun=[ppo]", "ppo.checkpoint_every=1000"]
    whole, seen = artifact(run_copy, "ppo"), ctrl_c(monkeypatch, at=1)
    assert launch(run_copy, *command) == 130
    message = capfd.readouterr().err
    assert "saving at the end of this iteration" in message
    assert "the same command goes on" in message
    assert "Traceback" not in message
    saved = (run_copy / "store" / ".staging").glob("ppo-*/checkpoints/step-*")
    assert [folder.name for folder in saved] == ["step-00000004"]
    assert record(run_copy).status == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert launch(run_copy, *command) == 0
    assert seen == ITERATIONS, "nothing was lost"
    assert weights(artifact(run_copy, "ppo")) == weights(whole)


def test_a_second_ctrl_c_leaves_at_once(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = artifact(run_copy, "ppo"), ctrl_c(monkeypatch, at=1, times=2)
    assert launch(run_copy, "eval=none", "rerun=[ppo]") == 130
    saved = (run_copy / "store" / ".staging").glob("ppo-*/checkpoints/step-*")
    assert [folder.name for folder in saved] == ["step-00000002"]
    assert launch(run_copy, "eval=none", "rerun=[ppo]") == 0
    assert seen == [0, 1, 1, 2], "the iteration in flight was replayed"
    assert weights(artifact(run_copy, "ppo")) == weights(whole)


def test_ctrl_c_in_the_last_iteration(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = artifact(run_copy, "ppo"), ctrl_c(monkeypatch, at=2)
    assert launch(run_copy, "eval=none", "rerun=[ppo]") == 130
    assert launch(run_copy, "eval=none", "rerun=[ppo]") == 0
    assert seen == ITERATIONS
    assert weights(artifact(run_copy, "ppo")) == weights(whole)


def test_ctrl_c_where_nothing_can_be_saved_leaves_at_once(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(ppo_stage, "build_policy", loading)
    assert launch(run_copy, "eval=none", "rerun=[ppo]") == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_with_its_own_code(
    number: int, code: int, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_to_stop(*_: Any) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(ExperienceCollector, "collect", told_to_stop)
    with pytest.raises(SystemExit) as caught:
        launch(run_copy, "eval=none", "rerun=[ppo]")
    assert caught.value.code == code
    assert record(run_copy).status == "interrupted"


def test_a_stage_that_exits_with_success_and_no_result_is_no_success(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exits(*_: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(ExperienceCollector, "collect", exits)
    with pytest.raises(RuntimeError, match="ended the program, without a result"):
        launch(run_copy, "eval=none", "rerun=[ppo]")


def test_the_key_of_a_server_is_in_no_file_of_the_run(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one that answers a few times, and then repeats the request's header."""
    # In parts: a manifest holds the difference of the code from its revision.
    key = "-".join(["rk", "secret", "of", "the", "test"])
    monkeypatch.setenv("REWARD_KEY", key)
    answered = 0

    def rule(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        nonlocal answered
        answered += 1
        if answered > 4:
            return 200, {}, f"bad header Bearer {key}"
        return 200, {}, json.dumps({"scores": [0.0] * len(body["responses"])})

    with JudgeServer(rule) as server:
        reward = [f"ppo.reward.url={server.url}", "ppo.reward.key_env=REWARD_KEY"]
        more = ["ppo.reward.request_size=4", "ppo.reward.retries=0", "stage=ppo"]
        assert launch(run_copy, "eval=none", *reward, *more) == 2
    assert "bad header Bearer ***" in capsys.readouterr().err
    files = [path for path in run_copy.rglob("*") if path.is_file()]
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_two_runs_of_one_config_train_once(tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCH), *small(tmp_path, "stage=sft")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [run.communicate(timeout=200)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert sum("running" in text for text in told) == 1, told
    artifact(tmp_path, "sft").verify()
    assert not list((tmp_path / "store" / ".staging").iterdir())


def test_a_sweep_trains_what_its_points_share_once(tmp_path: Path) -> None:
    sweep = ["-m", "name=first", "stage=ppo", "ppo.lr=1e-4,3e-4", "ppo.seed=0,1", "ppo.select=last"]
    assert launch(tmp_path, *sweep) == 0
    store = Store(tmp_path / "store")
    found = {stage: store.find(f"{stage}/") for stage in ("sft", "reward", "ppo")}
    assert {stage: len(artifacts) for stage, artifacts in found.items()} == {
        "sft": 1,
        "reward": 1,
        "ppo": 4,
    }
    points = [
        (one.manifest.config["ppo"]["lr"], one.manifest.config["ppo"]["seed"])
        for one in found["ppo"]
    ]
    assert points == [(1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1)]
    assert len({weights(one) for one in found["ppo"]}) == 4
    records = records_of(small_config(tmp_path)).sweep("first")
    assert [one.status for one in records] == ["done"] * 4
    assert {one.keys["sft"] for one in records} == {found["sft"][0].key}
    assert [one.objective for one in records] == [
        one.manifest.metrics["best_objective"] for one in found["ppo"]
    ]


def rows_of(outputs: Path, stage: str) -> int:
    """Return how many lines of metrics the unfinished work on a stage has."""
    lines = 0
    for path in (outputs / "store" / ".staging").glob(f"{stage}-*/metrics.jsonl"):
        try:
            lines += len(path.read_text().splitlines())
        except FileNotFoundError:  # published under our eyes
            continue
    return lines


def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL in each stage, at random moments, and the same command again each time."""
    longer = ["eval=none", "sft.steps=12", "reward.steps=12", "ppo.steps=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole, *longer) == 0

    drawn = random.Random()
    moments = [
        (stage, drawn.randint(1, 8), drawn.random() / 20) for stage in ("sft", "reward", "ppo")
    ]
    command = [sys.executable, str(LAUNCH), *small(killed, *longer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stage, rows, pause in moments:
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        while run.poll() is None and rows_of(killed, stage) < rows:
            time.sleep(0.01)
        time.sleep(pause)
        run.kill()
        assert run.wait(60) == -signal.SIGKILL, f"{moments}: {stage} was over before the kill"
    assert launch(killed, *longer) == 0, moments
    for stage in ("sft", "reward", "ppo"):
        assert weights(artifact(killed, stage)) == weights(artifact(whole, stage)), (stage, moments)
        numbers = [artifact(folder, stage).manifest.metrics for folder in (whole, killed)]
        assert numbers[0] == numbers[1], (stage, moments)
        found = [
            (artifact(folder, stage).path / "metrics.jsonl").read_text()
            for folder in (whole, killed)
        ]
        steps = [re.findall(r'"global_step": (\d+)', text) for text in found]
        assert steps[0] == steps[1], (stage, moments)


def test_parents_made_again_with_other_weights_are_noticed(run_copy: Path) -> None:
    """As where a parent was made again by edited code that its children do not run."""
    put_other_weights(artifact(run_copy, "sft"))
    assert launch(run_copy) == 2
    assert launch(run_copy, "cache=trust") == 0
    assert launch(run_copy, "rerun=[reward]") == 0
    assert artifact(run_copy, "ppo").manifest.inputs["sft"] != ""
    assert launch(run_copy) == 0
