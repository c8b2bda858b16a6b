"""Every file of a finished run, damaged in every way: it is named, or made again, or not needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_exp.commands.inspect import compare, report, status
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.plan import StepState, computed_with, plan
from rlhf_exp.store.sealed import sealed_values
from tests.lab import LAUNCH, ROOT, artifact, jsonl, pairs, run, small, small_config, weights

STAGES = ("sft", "reward", "ppo", "eval")
# What nobody reads any more once the stage is done.
UNREAD = ("run_id", "summary.json")
REPORTED = ("facts.json", "metrics.jsonl", "calibration.json")
NEXT_STAGE = {
    "sft": ("stage=ppo", "ppo.lr=2e-5"),
    "reward": ("stage=ppo", "ppo.lr=2e-5"),
    "ppo": ("stage=eval", "eval.seed=7"),
}


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"\x80\x04\xff" * 40),
    "another type": lambda path: path.write_text("[1]"),
}


# One that the size tells and one that only the digest tells; all others take their ways.
damages = pytest.mark.parametrize(
    "damage",
    [
        damage if damage in ("missing", "flipped") else pytest.param(damage, marks=pytest.mark.slow)
        for damage in DAMAGES
    ],
)


@contextmanager
def damaged(path: Path, damage: str) -> Iterator[None]:
    """Damage a file for the block."""
    content, place = path.read_bytes(), path.stat()
    DAMAGES[damage](path)
    assert not path.exists() or path.read_bytes() != content
    try:
        yield
    finally:
        path.write_bytes(content)
        assert path.stat().st_size == place.st_size


@contextmanager
def named(path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Expect a `UserError` or a warning that names the file, and nothing else."""
    caplog.clear()
    said = ""
    try:
        yield
    except UserError as error:
        said = str(error)
    assert str(path) in said + caplog.text


@pytest.fixture(scope="module")
def outputs(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small run whose files are damaged one after the other, and repaired."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("damage") / "outputs")


def published(outputs: Path, stage: str) -> list[Path]:
    """Return the files of a stage's artifact."""
    found = artifact(outputs, stage)
    return [found.path / name for name in found.manifest.files]


@damages
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_does_not_start_from_a_damaged_model(
    outputs: Path, stage: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in published(outputs, stage):
        if path.parent.name == "model":
            with damaged(path, damage), named(path, caplog):
                run(outputs, "eval.models=[sft,ppo]", *NEXT_STAGE[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_shows_files_that_are_missing_or_short(outputs: Path, stage: str) -> None:
    found = artifact(outputs, stage)
    assert found.damaged_files(computed_with) == []
    needed = []
    for path in published(outputs, stage):
        name = path.relative_to(found.path).as_posix()
        damage = "truncated" if path.stat().st_size > 1 else "missing"
        with damaged(path, damage):
            needed += found.damaged_files(computed_with)
            if name == "model/config.json":
                step = next(step for step in plan(small_config(outputs)) if step.stage == stage)
                assert (step.state, step.files) == (StepState.damaged, (name,))
    expected = {
        name
        for name in found.manifest.files
        if name not in (*UNREAD, "facts.json", "metrics.jsonl") and not name.startswith("tables/")
    }
    assert set(needed) == expected


def test_a_run_with_a_damaged_result_says_which_and_how_to_go_on(outputs: Path) -> None:
    path = artifact(outputs, "reward").path / "model" / "reward_head.safetensors"
    remedy = r"is missing: the artifact is damaged\. Restore the file, .* rerun=\[reward\]"
    with damaged(path, "missing"), pytest.raises(UserError, match=rf"{path} {remedy}"):
        run(outputs, "name=small")


@damages
@pytest.mark.parametrize("stage", STAGES)
def test_a_report_does_without_a_damaged_file_and_says_so(
    outputs: Path, stage: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in published(outputs, stage):
        if path.name in REPORTED if stage != "eval" else path.name in ("facts.json", "result.json"):
            with damaged(path, damage), named(path, caplog):
                page = Path(report(outputs, ["small"], "page").strip())
            assert path.name in page.read_text()
    with damaged(artifact(outputs, "ppo").path / "metrics.jsonl", damage):
        assert json.loads(report(outputs, ["small"], "json"))["runs"]


@damages
def test_commands_name_a_damaged_manifest_record_or_result(
    outputs: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (record,) = (outputs / "sweeps" / "small").glob("*.json")
    manifest = artifact(outputs, "ppo").path / "manifest.json"
    result = artifact(outputs, "eval").path / "result.json"
    commands: list[tuple[Path, Callable[[], object]]] = [
        (record, lambda: status(outputs, None)),
        (manifest, lambda: plan(small_config(outputs))),
        (manifest, lambda: report(outputs, ["small"], "page")),
        (result, lambda: compare(outputs, "small", "small")),
    ]
    for path, command in commands:
        if damage == "missing" and path != result:
            continue  # then there is no run, or no result, and it is made
        if damage == "flipped" and path != result:
            continue  # a text that is another text: only results and caches carry digests
        with damaged(path, damage), named(path, caplog):
            command()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_plan_makes_its_notes_again(
    outputs: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = outputs.parent / "rows.jsonl"
    jsonl(rows, pairs(20))
    os.utime(rows, (1e9, 1e9))
    asked = (f"data.preferences={rows}", "data.source=jsonl")
    keys = [(step.key, step.state) for step in plan(small_config(outputs, *asked))]
    notes = outputs / "cache" / "digests.json"
    with damaged(notes, damage):
        again = [(step.key, step.state) for step in plan(small_config(outputs, *asked))]
        sealed_values(notes)  # whole again
    assert again == keys
    assert (str(notes) in caplog.text) is (damage != "missing")


def launched(outputs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run `launch.py` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(LAUNCH), *small(outputs, *overrides)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


CACHED = {
    "reward": ("chosen.flat.npy", "rejected.offsets.npy", "counts.json", "digests.json"),
    "ppo": ("original.flat.npy", "prompt.offsets.npy", "original_scores"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", CACHED)
def test_damaged_caches_are_made_again_by_a_run(
    small_run: Path, run_copy: Path, stage: str, damage: str
) -> None:
    """Each file of the stage's sets in turn; the result is the one of the undamaged cache."""
    for name in CACHED[stage]:
        pattern = f"tokenized/*/{name}" if "." in name else f"{name}/*.npy"
        paths = sorted((run_copy / "cache").glob(pattern))
        assert paths
        for path in paths:
            DAMAGES[damage](path)
        shutil.rmtree(run_copy / "store" / stage)
        done = launched(run_copy, f"stage={stage}")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert damage == "missing" or "again" in done.stderr, (name, done.stderr)
        assert weights(artifact(run_copy, stage)) == weights(artifact(small_run, stage)), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_names_what_is_damaged_in_the_store(run_copy: Path, damage: str) -> None:
    for stage, asked in NEXT_STAGE.items():
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            path = artifact(run_copy, stage).path / "model" / name
            with damaged(path, damage):
                done = launched(run_copy, *asked)
            assert (done.returncode, str(path) in done.stderr) == (2, True), done.stderr
            assert "Traceback" not in done.stderr
            assert f"rerun=[{stage}]" in done.stderr
