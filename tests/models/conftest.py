"""Random tiny models of every family, and batches to run through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_exp.batch import Demonstrations
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.pretrained import build_causal_lm

VOCABULARY = 89
FAMILIES = {
    "gpt2": Architecture("gpt2", 4, 32, 4, 64, VOCABULARY, 48, tied=True),
    "gptj": Architecture("gptj", 4, 32, 4, 64, VOCABULARY, 48),
    "gpt_neox": Architecture("gpt_neox", 4, 32, 4, 64, VOCABULARY, 48),
    "llama": Architecture("llama", 4, 32, 4, 64, VOCABULARY, 48, kv_heads=2),
    "qwen2": Architecture("qwen2", 4, 32, 4, 64, VOCABULARY, 48, kv_heads=2),
    "qwen3": Architecture(
        "qwen3", 4, 32, 4, 64, VOCABULARY, 48, kv_heads=2, tied=True, head_width=16
    ),
}

PACKED_LENGTHS = [[5, 7, 3], [9, 2]]
"""Tokens of the sequences in each packed row."""


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Return a builder of random models, with weights so large that errors stand out."""

    def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
        model = build_causal_lm(replace(FAMILIES[family], **changes), seed=seed, eos_id=1, pad_id=1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.2 if parameter.ndim > 1 else 0.05))
        return model

    return build


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """Return four rows of prompt and response, as the arguments that policies take."""
    generator = torch.Generator().manual_seed(7)
    prompts = torch.tensor([5, 3, 8, 1])
    responses = torch.tensor([7, 12, 1, 4])
    tokens = torch.randint(2, VOCABULARY, (4, 15), generator=generator)
    for row, end in enumerate((prompts + responses).tolist()):
        tokens[row, end:] = 1
    return {"tokens": tokens, "prompt_lengths": prompts, "response_lengths": responses}


@pytest.fixture
def packed() -> Demonstrations:
    """Two rows of three and two sequences; every token but each first is a target."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 89, (2, 16), generator=generator)
    positions, segments = torch.zeros(2, 16).long(), torch.zeros(2, 16).long()
    for row, lengths in enumerate(PACKED_LENGTHS):
        start = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, start : start + length] = torch.arange(length)
            segments[row, start : start + length] = number
            start += length
    return Demonstrations(tokens, positions, segments, (segments > 0) & (positions > 0))
