"""Editing the code of the package, in a copy of it, and running again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_exp.pipeline import plan as planning
from rlhf_exp.store.artifact import Artifact
from tests.lab import ROOT, artifact, launch

STAGES = ("sft", "reward", "ppo", "eval")


class Forgetful(dict[str, dict[str, str]]):
    """Holds nothing from one question to the next."""

    def __contains__(self, key: object) -> bool:
        return False


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, which is taken for the code that runs."""
    ignored = shutil.ignore_patterns("__pycache__")
    copied = shutil.copytree(ROOT / "rlhf_exp", tmp_path / "rlhf_exp", ignore=ignored)
    monkeypatch.setattr(planning, "PACKAGE", copied)
    # Each launch of a test stands for a process of its own, which reads the code anew.
    monkeypatch.setattr(planning, "_first_seen", Forgetful())
    return copied


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def all_of(outputs: Path) -> dict[str, Artifact]:
    return {stage: artifact(outputs, stage) for stage in STAGES}


def created(outputs: Path) -> dict[str, str]:
    return {stage: one.manifest.created for stage, one in all_of(outputs).items()}


def test_an_edited_loss_is_noticed(
    package: Path, run_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = created(run_copy)
    edit(package / "algo" / "losses.py", "0.5", "0.25")
    assert launch(run_copy) == 2
    message = capfd.readouterr().err
    for stage in ("sft", "reward", "ppo"):
        assert f"{stage} {artifact(run_copy, stage).key}: rlhf_exp/algo/losses.py" in message
    assert "rerun=[sft]" in message
    assert "cache=trust" in message
    assert "Traceback" not in message

    assert launch(run_copy, "cache=trust") == 0
    assert "trusted although" in capfd.readouterr().err
    assert created(run_copy) == before


def test_only_what_runs_the_edited_code_is_in_doubt(
    package: Path, run_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = created(run_copy)
    edit(package / "algo" / "advantages.py", "1e-8", "1e-6")
    assert launch(run_copy) == 2
    message = capfd.readouterr().err
    assert f"ppo {artifact(run_copy, 'ppo').key}: rlhf_exp/algo/advantages.py" in message
    assert f"reward {artifact(run_copy, 'reward').key}:" not in message

    assert launch(run_copy, "rerun=[ppo]") == 0
    after = created(run_copy)
    assert [stage for stage in STAGES if after[stage] != before[stage]] == ["ppo", "eval"]
    assert launch(run_copy) == 0
    assert created(run_copy) == after, "made by the code there is now: nothing is in doubt"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("algo/losses.py", "# a comment\n"),
        ("algo/losses.py", '"""A docstring of nothing."""\n'),
        ("config/sft.py", "EXPLAINED = 'better'\n"),
        ("report/page.py", "COLOUR = 'blue'\n"),
        ("vllm/engine.py", "UNUSED = 'by a run that samples natively'\n"),
    ],
)
def test_what_changes_no_result_is_no_change(
    package: Path, run_copy: Path, file: str, text: str
) -> None:
    before = created(run_copy)
    with (package / file).open("a") as handle:
        handle.write(f"\n\n{text}")
    assert launch(run_copy) == 0
    assert created(run_copy) == before


def test_no_stage_runs_before_everything_is_known(package: Path, run_copy: Path) -> None:
    edit(package / "algo" / "advantages.py", "1e-8", "1e-6")
    shutil.rmtree(artifact(run_copy, "sft").path)
    # SFT would have to run, but PPO's result is in doubt: nothing is trained in vain.
    assert launch(run_copy) == 2
    assert not list((run_copy / "store" / "sft").iterdir())
