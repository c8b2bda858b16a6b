"""Snapshots: what a result holds beside the published model is what a shorter run publishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from rlhf_exp.commands.models import export
from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.store import Store
from tests.lab import run

# With a constant learning rate the first steps of a run do not depend on how many follow.
STEADY = ("schedule=constant", "warmup_steps=0", "select=last")


def trained(outputs: Path, stage: str, *settings: str) -> Artifact:
    """Train one stage on the small run's parents and return what it left."""
    run(outputs, f"stage={stage}", *(f"{stage}.{one}" for one in (*STEADY, *settings)))
    return Store(outputs / "store").find(f"{stage}/")[-1]


def same(first: Path, second: Path) -> bool:
    """Return whether two folders hold the same weights, but for rounding."""
    pairs = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert pairs[0].keys() == pairs[1].keys()
    # A key's bias has a gradient of rounding alone, which Adam blows up to full steps.
    return all(
        torch.allclose(value, pairs[1][name], atol=1e-4)
        for name, value in pairs[0].items()
        if not name.endswith("query_key_value.bias")
    )


@pytest.mark.parametrize(("stage", "with_mean"), [("sft", False), ("reward", True), ("ppo", False)])
def test_a_snapshot_is_what_a_shorter_run_publishes(
    run_copy: Path, stage: str, with_mean: bool
) -> None:
    long = trained(run_copy, stage, "keep_every=4")
    short = trained(run_copy, stage, "steps=4")
    long.verify()
    (folder,) = (long.path / "snapshots").glob("step-*")
    assert folder.name == "step-00000004"
    names = sorted(path.name for path in (short.path / "model").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert same(folder, short.path / "model")
    assert not same(folder, long.path / "model")
    if with_mean:
        of_both = [
            json.loads((one / "reward_model.json").read_text())
            for one in (folder, short.path / "model")
        ]
        assert of_both[0] == pytest.approx(of_both[1], rel=1e-4)
    AutoModel.from_pretrained(folder)
    assert not any((long.path / name).exists() for name in ("checkpoints", "kept", "best"))


def test_best_and_last_can_be_kept_beside_each_other(run_copy: Path) -> None:
    outputs = run_copy
    # So large a step that the first evaluation after it is worse than the one before training.
    best = trained(outputs, "sft", "lr=100", "select=best", "keep=[last]")
    index = json.loads((best.path / "snapshots" / "index.json").read_text())
    assert (index["published"], index["last"]) == (index["best"], 6)
    assert index["best"] < 6
    assert [path.name for path in (best.path / "snapshots").glob("step*")] == ["step-00000006"]
    last = trained(outputs, "sft", "lr=100", "keep=[best]")
    index = json.loads((last.path / "snapshots" / "index.json").read_text())
    assert (index["published"], index["last"]) == (6, 6)
    (folder,) = (last.path / "snapshots").glob("step*")
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (best.path / "model" / name).read_bytes()
    published = (best.path / "snapshots" / "step-00000006" / name).read_bytes()
    assert (last.path / "model" / name).read_bytes() == published


def test_a_result_in_the_store_is_not_made_again_for_them(
    run_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {one.key: one.manifest.created for one in Store(run_copy / "store").all()}
    run(run_copy, "stage=sft", "sft.keep_every=2")
    said = " ".join(capfd.readouterr().err.split())
    assert "without what sft.keep_every asks for; rerun=[sft] makes it again" in said
    assert {one.key: one.manifest.created for one in Store(run_copy / "store").all()} == before
    run(run_copy, "stage=sft", "sft.keep_every=2", "rerun=[sft]")
    (made,) = Store(run_copy / "store").find("sft/")
    steps = {int(path.name[5:]) for path in (made.path / "snapshots").glob("step-*")}
    published = int(made.manifest.metrics["published_step"])
    assert steps | {published} == {2, 4, 6}
    for step in (2, 4, 6):
        folder = Path(export(run_copy, "unnamed", run_copy / f"of-{step}", step))
        source = "model" if step == published else f"snapshots/step-{step:08d}"
        assert same(folder, made.path / source)
        assert f"after {step} optimizer steps" in (folder / "README.md").read_text()
    with pytest.raises(
        UserError, match=r"--step 3: sft \w+ holds no model .* only of 2, 4, 6; sft"
    ):
        export(run_copy, "unnamed", run_copy / "of-3", 3)
