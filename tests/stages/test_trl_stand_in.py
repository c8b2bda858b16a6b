"""RLOO, GRPO and DPO by TRL, with a stand-in for the worker; `test_trl.py` has TRL itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.stages import trl_dpo, trl_ppo
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.store import Store
from tests.lab import artifact, run

STAND_IN = Path(__file__).parent / "stand_in_trl"
ENGINE = ("engine=trl", f"engine.python={sys.executable}")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (trl_ppo, trl_dpo):
        monkeypatch.setattr(stage, "program_of", lambda module: [STAND_IN])


def newest(outputs: Path, stage: str) -> Artifact:
    found = Store(outputs / "store").find(f"{stage}/")
    return max(found, key=lambda one: one.manifest.created)


def rows(found: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]


def moved(outputs: Path, found: Artifact) -> None:
    """Check that 0.5 was added for each iteration of three."""
    sft = load_file(artifact(outputs, "sft").path / "model" / "model.safetensors")
    for name, value in load_file(found.path / "model" / "model.safetensors").items():
        torch.testing.assert_close(value, sft[name] + 1.5)


def test_rollouts_leave_an_artifact_like_any_other(run_copy: Path) -> None:
    native = artifact(run_copy, "ppo")
    sized = ("ppo=grpo", "ppo.samples_per_prompt=4", "ppo.kl.target=null", "ppo.select=last")
    run(run_copy, *ENGINE, *sized)
    found = newest(run_copy, "ppo")
    found.verify()
    assert found.key != native.key
    assert found.manifest.parents == native.manifest.parents, "SFT and reward model are shared"
    moved(run_copy, found)
    assert [row["global_step"] for row in rows(found) if "loss/total" in row] == [2, 4, 6]
    assert [row["global_step"] for row in rows(found) if "eval/objective" in row] == [0, 2, 4, 6]
    facts = json.loads((found.path / "facts.json").read_text())
    assert facts["libraries"] == f"trl 1.16.0, torch {torch.__version__}"
    assert facts["prompts"] == 40
    names = {path.name for path in found.path.iterdir()}
    assert "trl.log" in names
    assert "trl" not in names, "what was handed over stays nowhere"
    evaluated = newest(run_copy, "eval")
    assert evaluated.manifest.parents["ppo"] == found.key
    assert "eval/reward/difference" in evaluated.manifest.metrics


def test_pairs_do_too(run_copy: Path) -> None:
    sized = ("dpo.steps=3", "dpo.epochs=null", "dpo.batch=8", "dpo.seq_length=128")
    sized += ("dpo.eval_every=1", "dpo.eval_prompts=4", "dpo.select=last")
    run(run_copy, "stage=dpo", *ENGINE, *sized, "dpo.generation.max_new_tokens=8")
    found = newest(run_copy, "dpo")
    found.verify()
    moved(run_copy, found)
    losses = [row["eval/loss"] for row in rows(found) if "eval/loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses == sorted(losses, reverse=True), "the ratios of chosen responses rise"
    assert rows(found)[0]["eval/ended_fraction"] == 1.0
    assert json.loads((found.path / "facts.json").read_text())["pairs"] > 20
