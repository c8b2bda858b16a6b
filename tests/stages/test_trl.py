"""RLOO, GRPO and DPO by TRL, with TRL itself: marker `trl`.

They need `RLHF_EXP_TRL_PYTHON`, an interpreter made by `rlhf_exp/trl/setup.sh`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.store import Store
from tests.lab import artifact, run

pytestmark = [pytest.mark.trl, pytest.mark.timeout(600)]

ROLLOUTS = (
    "ppo.rollouts=8",
    "ppo.batch=4",
    "ppo.epochs=2",
    "ppo.steps=8",
    "ppo.samples_per_prompt=4",
    "ppo.kl.target=null",
    "ppo.select=last",
    "ppo.eval_every=4",
)
DPO = (
    "dpo.steps=6",
    "dpo.epochs=null",
    "dpo.batch=8",
    "dpo.seq_length=128",
    "dpo.eval_prompts=4",
    "dpo.generation.max_new_tokens=8",
    "dpo.generation.temperature=0.7",  # of answers alone: losses of pairs know none
    "dpo.eval_every=3",
    "dpo.select=last",
)


@pytest.fixture
def engine() -> tuple[str, str]:
    found = os.environ.get("RLHF_EXP_TRL_PYTHON")
    if not found:
        pytest.skip("RLHF_EXP_TRL_PYTHON names no interpreter with TRL")
    return "engine=trl", f"engine.python={found}"


def newest(outputs: Path, stage: str) -> Artifact:
    found = Store(outputs / "store").find(f"{stage}/")
    return max(found, key=lambda one: one.manifest.created)


def logged(found: Artifact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]


def moved(outputs: Path, found: Artifact) -> set[str]:
    sft = load_file(artifact(outputs, "sft").path / "model" / "model.safetensors")
    trained = load_file(found.path / "model" / "model.safetensors")
    return {name for name, value in trained.items() if not torch.equal(value, sft[name])}


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("rloo", ("ppo.train_blocks=1",)),
        ("grpo", ("ppo.train_blocks=null", "ppo.warmup_steps=2", "ppo.schedule=linear")),
        # One update for each sampling: TRL then computes no old log-probabilities.
        ("grpo", ("ppo.epochs=1", "ppo.batch=8", "ppo.steps=2", "ppo.eval_every=1")),
    ],
)
def test_rollouts(
    run_copy: Path, engine: tuple[str, str], algorithm: str, more: tuple[str, ...]
) -> None:
    changed = {text.partition("=")[0] for text in more}
    kept = [text for text in ROLLOUTS if text.partition("=")[0] not in changed]
    run(run_copy, *engine, f"ppo={algorithm}", *kept, *more)
    found = newest(run_copy, "ppo")
    found.verify()
    assert found.manifest.parents == {
        role: artifact(run_copy, role).key for role in ("sft", "reward")
    }
    AutoModelForCausalLM.from_pretrained(found.path / "model")
    names = moved(run_copy, found)
    if "ppo.train_blocks=1" in more:
        assert names
        assert not [name for name in names if "layers.0." in name or "embed" in name]
    else:
        assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    rows = logged(found)
    updates = [row for row in rows if "loss/total" in row]
    evaluated = [row for row in rows if "eval/objective" in row]
    assert len(updates) == 2, "iterations"
    assert [row["global_step"] for row in evaluated] == [0] + [
        row["global_step"] for row in updates
    ]
    # The reference is the policy before training.
    assert evaluated[0]["eval/kl_sequence"] == pytest.approx(0.0, abs=1e-4)
    assert abs(evaluated[-1]["eval/kl_sequence"]) > 1e-5
    assert updates[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-3)
    assert abs(updates[1]["kl/sequence"]) > 1e-5
    if "ppo.warmup_steps=2" in more:
        # Steps 4 and 8 of 8: (8 - 2 - 1) / (8 - 2) of the way is left after step 3, 1/6 after 7.
        assert [row["optim/lr"] for row in updates] == pytest.approx(
            [updates[0]["optim/lr"], updates[0]["optim/lr"] / 5]
        )
    facts = json.loads((found.path / "facts.json").read_text())
    assert facts["libraries"].startswith("trl 1.16.0, transformers 5.")
    assert (found.path / "trl.log").is_file()
    assert not (found.path / "trl").exists(), "what was handed over stays nowhere"
    assert len(Store(run_copy / "store").find("eval/")) == 2, "evaluated as any other"


def by_step(found: Artifact) -> dict[int, dict[str, float]]:
    merged: dict[int, dict[str, float]] = {}
    for row in logged(found):
        merged.setdefault(row["global_step"], {}).update(row)
    return merged


def test_pairs(run_copy: Path, engine: tuple[str, str]) -> None:
    """Step by step the native engine's own: the same pairs, losses, gradients and weights."""
    run(run_copy, "stage=dpo", *DPO)
    run(run_copy, "stage=dpo", *engine, *DPO)
    native, theirs = sorted(
        Store(run_copy / "store").find("dpo/"), key=lambda one: one.manifest.created
    )
    theirs.verify()
    assert theirs.manifest.parents == {"sft": artifact(run_copy, "sft").key}
    ours, found = by_step(native), by_step(theirs)
    names = ("loss/total", "dpo/accuracy", "dpo/margin", "dpo/reward_chosen")
    names += ("dpo/reward_rejected", "eval/loss", "eval/margin", "eval/accuracy")
    names += ("optim/grad_norm", "optim/lr")
    assert ours.keys() == found.keys() == set(range(7))
    # At the start all pairs are ties but for rounding, of which TRL counts none.
    del ours[1]["dpo/accuracy"], ours[0]["eval/accuracy"]
    compared = 0
    for step, values in ours.items():
        for name in names:
            if name in values:
                expected = pytest.approx(values[name], rel=1e-3, abs=1e-4)
                assert found[step][name] == expected, (name, step)
                compared += 1
    assert compared > 40
    weights = [load_file(one.path / "model" / "model.safetensors") for one in (native, theirs)]
    start = load_file(artifact(run_copy, "sft").path / "model" / "model.safetensors")
    apart = max((weights[0][name] - weights[1][name]).abs().mean().item() for name in start)
    moved_by = max((weights[0][name] - start[name]).abs().mean().item() for name in start)
    assert apart < 0.01 * moved_by


def test_a_reward_function_that_fails_is_told(
    run_copy: Path, engine: tuple[str, str], tmp_path: Path
) -> None:
    function = tmp_path / "mine.py"
    function.write_text("def score(prompts, responses):\n    raise KeyError('mine')\n")
    scored = (f"ppo.reward.function={function}:score", "ppo=rloo", *ROLLOUTS)
    with pytest.raises(UserError, match=r"mine\.py:2: KeyError: 'mine'"):
        run(run_copy, "stage=ppo", *engine, *scored)
