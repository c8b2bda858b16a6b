"""A worker's model: whether it computes what it is expected to, and the weights that it leaves.

It needs torch, transformers and safetensors of any version of the last years.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from engine_line import peak_resident_bytes
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-3  # nats: between two versions of transformers, 1e-6 was seen


@torch.no_grad()
def check(folder: str, expected: dict[str, Any]) -> None:
    """Check that model and tokenizer compute here as they do on the other side.

    Raises:
        ValueError: They are read in another way here.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(expected["texts"], expected["text_ids"], strict=True):
        own_ids = tokenizer(text, add_special_tokens=False).input_ids
        if own_ids != ids:
            raise ValueError(f"the tokenizer makes {own_ids} of {text!r}, where {ids} is expected")
    tokens = torch.tensor([expected["ids"]])
    logits = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).flatten()
    error = float((logprobs - torch.tensor(expected["logprobs"])).abs().max())
    if not error < TOLERANCE:
        raise ValueError(f"log-probabilities differ by {error:.3g} nats from those expected")


def save_weights(named: Iterable[tuple[str, nn.Parameter]], path: Path) -> None:
    """Write parameters, whole or not at all."""
    weights = {name: value.detach().cpu().contiguous() for name, value in named}
    partial = path.with_name(f".{path.name}")
    save_file(weights, partial)
    os.replace(partial, path)


def peak_bytes() -> int:
    """Return the most memory that the accelerator has held at once; without one, the process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()
