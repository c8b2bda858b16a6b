"""Before the first update policy and reference are one model, in each number format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab import run

WAYS = {
    "every layer": (),
    "top blocks": ("ppo.train_blocks=1",),
    "lora": ("ppo.lora.rank=2",),
    "values of a model of their own": ("ppo.value_trunk=own",),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder whose SFT and reward models every run shares."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("way", WAYS)
def test_the_divergence_is_exactly_0_in_bfloat16(outputs: Path, way: str) -> None:
    stored = set((outputs / "store" / "ppo").glob("*/metrics.jsonl"))
    run(outputs, "stage=ppo", "model.dtype=bfloat16", "ppo.steps=2", *WAYS[way])
    (path,) = set((outputs / "store" / "ppo").glob("*/metrics.jsonl")) - stored
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    divergences = [row["kl/sequence"] for row in rows if "kl/sequence" in row]
    assert divergences[0] == 0.0, divergences


def test_dpos_margins_are_exactly_0_in_bfloat16(outputs: Path) -> None:
    sizes = ("dpo.steps=1", "dpo.epochs=null", "dpo.batch=8", "dpo.seq_length=128")
    run(outputs, "stage=dpo", "model.dtype=bfloat16", "dpo.generation.max_new_tokens=8", *sizes)
    (path,) = (outputs / "store" / "dpo").glob("*/metrics.jsonl")
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["eval/margin"], first["eval/kl_sequence"]) == (0.0, 0.0)
