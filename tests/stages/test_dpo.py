"""The DPO stage: from SFT and pairs; what it keeps; its policy beside PPO's in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_exp.models.pretrained import load_causal_lm
from tests.lab import artifact, launch, weights

DPO = (
    "name=dpo",
    "dpo.steps=6",
    "dpo.epochs=null",
    "dpo.batch=8",
    "dpo.seq_length=128",
    "dpo.eval_prompts=4",
    "dpo.generation.max_new_tokens=8",
    "dpo.eval_every=3",
    "dpo.checkpoint_every=2",
)


def rows(outputs: Path) -> list[dict[str, float]]:
    text = (artifact(outputs, "dpo").path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_it_trains_the_sft_policy_and_evaluates_it(run_copy: Path) -> None:
    assert launch(run_copy, "stage=eval", "eval.models=[sft,dpo,ppo]", *DPO) == 0
    found = artifact(run_copy, "dpo")
    assert found.manifest.parents == {"sft": artifact(run_copy, "sft").key}
    assert weights(found) != weights(artifact(run_copy, "sft"))
    assert not (found.path / "model" / "value_head.safetensors").exists()
    model = load_causal_lm(str(found.path / "model"))
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    first = rows(run_copy)[0]
    assert first["eval/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert first["eval/kl_sequence"] == pytest.approx(0.0, abs=1e-4)
    last = {name: value for row in rows(run_copy) for name, value in row.items()}
    for name in ("dpo/accuracy", "dpo/reward_chosen", "dpo/reward_rejected", "dpo/margin"):
        assert name in last
    results = [path.read_text() for path in (run_copy / "store" / "eval").glob("*/result.json")]
    assert sum('"DPO"' in text for text in results) == 1


def test_the_reference_is_computed_once_for_all_runs_with_its_pairs(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch(run_copy, "stage=dpo", *DPO) == 0
    kept = sorted((run_copy / "cache" / "reference_logprobs").glob("*.npy"))
    assert len(kept) == 2  # training pairs, validation pairs

    def computed(*args: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_exp.stages.dpo.pair_logprobs", computed)
        assert launch(run_copy, "stage=dpo", "dpo.beta=0.5", *DPO) == 0
    assert sorted((run_copy / "cache" / "reference_logprobs").glob("*.npy")) == kept


def test_made_again_it_has_the_same_weights(run_copy: Path) -> None:
    """From what is kept of the reference as from what was computed."""
    assert launch(run_copy, "stage=dpo", *DPO) == 0
    whole = weights(artifact(run_copy, "dpo"))
    assert launch(run_copy, "stage=dpo", "rerun=[dpo]", *DPO) == 0
    assert weights(artifact(run_copy, "dpo")) == whole
