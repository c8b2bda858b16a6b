"""A finished PPO run that is extended equals one run of all the steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.cli import main
from rlhf_exp.commands.runs import OutputFolder
from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import Artifact
from tests.lab import artifact, edit_manifest, run

# Two optimizer steps an iteration. The first end, step 6, is no multiple of 4: its evaluation and
# its snapshot are there only because the run ends.
OPTIONS = (
    "stage=ppo",
    "ppo.eval_every=4",
    "ppo.keep_every=4",
    "ppo.keep=[best,last]",
    "ppo.lr=1e-2",
)
TIMES = ("time/", "throughput/", "memory/")


def made(outputs: Path, name: str) -> Artifact:
    """Return the PPO of a run."""
    return OutputFolder(outputs).artifacts(name)["ppo"]


def logged(one: Artifact) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (one.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def digests(one: Artifact, *folders: str) -> dict[str, str]:
    files = one.manifest.files.items()
    return {name: entry.sha256 for name, entry in files if name.startswith(folders)}


@pytest.fixture(scope="module")
def outputs(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, and a PPO of 6 steps that keeps its state, as `first`."""
    folder = shutil.copytree(small_run, tmp_path_factory.mktemp("continue") / "outputs")
    run(folder, *OPTIONS, "name=first", "ppo.keep_state=true")
    return folder


@pytest.fixture
def copied(outputs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(outputs, tmp_path / "outputs")


def test_extended_twice_it_equals_an_uninterrupted_run(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(copied, *OPTIONS, "name=whole", "ppo.steps=14")
    whole, first = made(copied, "whole"), made(copied, "first")
    # The evaluation of the end, which the whole run has not.
    assert [row["global_step"] for row in logged(first) if "eval/objective" in row] == [0, 4, 6]
    extended = [*OPTIONS, "ppo.keep_state=true"]
    run(copied, *extended, "name=two", "ppo.continue_from=first", "ppo.steps=10")
    second = made(copied, "two")
    capfd.readouterr()
    run(copied, *extended, "name=three", f"ppo.continue_from={second.key}", "ppo.steps=14")
    assert f"goes on from {second.key}" in capfd.readouterr().err
    third = made(copied, "three")

    assert logged(third) == logged(whole)
    assert digests(third, "model/", "snapshots/") == digests(whole, "model/", "snapshots/")
    assert third.manifest.metrics == whole.manifest.metrics
    assert third.manifest.objective == whole.manifest.objective
    assert len({one.key for one in (whole, first, second, third)}) == 4
    for child, parent in ((third, second), (second, first)):
        assert child.manifest.parents["continued"] == parent.key
        assert child.manifest.inputs.keys() == {"sft", "reward", "continued"}
    assert "continued" not in whole.manifest.parents
    assert not digests(whole, "checkpoints/", "best/", "kept/")
    # Other steps' evaluations are there, so the comparison is of something.
    objectives = [row["eval/objective"] for row in logged(whole) if "eval/objective" in row]
    assert len(set(objectives)) == 5


def test_an_interrupted_extension_goes_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*OPTIONS, "name=longer", "ppo.continue_from=first", "ppo.steps=10"]

    def stopped(*_: object) -> None:
        raise UserError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_exp.stages.ppo.build_policy", stopped)
        with pytest.raises(UserError, match="stopped by the test"):
            run(copied, *asked)
    run(copied, *asked)
    found = made(copied, "longer")
    assert [row["global_step"] for row in logged(found) if "loss/total" in row] == [2, 4, 6, 8, 10]
    count = len(list((copied / "store" / "ppo").iterdir()))
    run(copied, *asked)
    assert len(list((copied / "store" / "ppo").iterdir())) == count, "it is in the store"


def refused(outputs: Path, *overrides: str) -> str:
    options = [*OPTIONS, "ppo.continue_from=first", "ppo.steps=10"]
    names = {text.partition("=")[0] for text in overrides}
    kept = [text for text in options if text.partition("=")[0] not in names]
    with pytest.raises(UserError) as caught:
        run(outputs, *kept, *overrides)
    return str(caught.value)


def test_all_else_must_be_equal(outputs: Path) -> None:
    told = refused(outputs, "ppo.lr=0.5", "ppo.reward.clip=null", "reward.seq_length=96")
    assert told.startswith("ppo.continue_from=first: only ppo.steps may differ from that run")
    key = artifact(outputs, "reward").key
    lines = told.splitlines()[1:]
    assert "  ppo.lr: 0.01 there, 0.5 here" in lines
    assert "  ppo.reward.clip: 10.0 there, None here" in lines
    assert "  reward.seq_length: 128 there, 96 here" in lines
    assert any(line.startswith(f"  the reward model: {key} there, ") for line in lines)
    assert len(lines) == 4
    # What does not count may differ.
    run(outputs, *OPTIONS, "ppo.continue_from=first", "ppo.steps=8", "ppo.checkpoint_every=3")


def test_more_steps_are_needed(outputs: Path) -> None:
    told = refused(outputs, "ppo.steps=6")
    assert "that run has ppo.steps=6, and ppo.steps=6 is the number of all steps" in told


def test_a_run_without_its_state(outputs: Path, small_run: Path) -> None:
    key = artifact(small_run, "ppo").key
    told = refused(
        outputs,
        f"ppo.continue_from={key}",
        "ppo.eval_every=2",
        "ppo.keep_every=null",
        "ppo.keep=[]",
        "ppo.lr=0.001",
    )
    assert f"ppo {key} did not keep its state; make it again with ppo.keep_state=true" in told


def test_what_is_no_finished_ppo_run(outputs: Path) -> None:
    assert "no such folder, run or key" in refused(outputs, "ppo.continue_from=nothing")
    folder = artifact(outputs, "sft").path
    told = refused(outputs, f"ppo.continue_from={folder}")
    assert told.endswith("that is a result of sft, not of ppo")


def test_a_run_made_by_other_code_or_from_other_weights(copied: Path) -> None:
    found = made(copied, "first")
    code = {**found.manifest.code, "rlhf_exp/algo/losses.py": "other"}
    edit_manifest(found, code=code)
    told = refused(copied)
    assert "was made with has changed since: rlhf_exp/algo/losses.py" in told
    assert "cache=trust" in told
    edit_manifest(found, inputs={**found.manifest.inputs, "sft": "other"})
    assert "rlhf_exp/algo/losses.py, sft (made anew)" in refused(copied)
    assert "other weights of sft" in refused(copied, "cache=trust")
    edit_manifest(found, inputs=found.manifest.inputs)
    run(copied, *OPTIONS, "ppo.continue_from=first", "ppo.steps=8", "cache=trust")
    assert "reward (made again)" in refused(copied, "rerun=[reward]")


def test_the_store_says_what_a_state_takes(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--outputs", str(outputs), "store", "ls"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "to go on from" in line]
    assert len(rows) == 1
    assert "of first" in rows[0]


def test_a_state_that_is_asked_for_later(outputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(outputs, "stage=ppo", "ppo.keep_state=true")
    told = " ".join(capfd.readouterr().err.split())
    assert "is in the store without what ppo.keep_state asks for; rerun=[ppo] makes" in told
