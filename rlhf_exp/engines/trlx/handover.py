"""What the worker is given: the model in old clothes, the prompts, and a plan.

plan.json          trlx's config, the order of prompts, what is checked before training
prompts.jsonl      {"index": 3, "ids": [...]}: the training prompts that the run meets
validation.jsonl   the same of the validation prompts
model/             see `convert.py`
weights.safetensors   written by the worker: what is published
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_exp.data.codec import Codec
from rlhf_exp.data.order import batch_index
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.engines.trlx.convert import write_old_model
from rlhf_exp.engines.trlx.settings import TrlxSettings, chunks, trl_config

WEIGHTS = "weights.safetensors"
_CHECKED = 16  # texts


def hand_over(
    folder: Path,
    model: PreTrainedModel,
    codec: Codec,
    prompts: TokenizedPrompts,
    validation: TokenizedPrompts,
    settings: TrlxSettings,
) -> Path:
    """Write all that the worker reads into `folder`; return the plan's path.

    Args:
        folder: Made here.
        model: What training starts from, in float32.
        codec: Of its tokenizer.
        prompts: The training prompts.
        validation: The validation prompts.
        settings: The run's.
    """
    write_old_model(model, codec.tokenizer, folder / "model")
    order = prompt_order(len(prompts), settings)
    count = min(settings.eval_prompts, len(validation))
    plan = {
        "config": trl_config(settings, folder / "model", folder),
        "stop_strings": list(codec.stop_strings),
        "prompts": _rows(folder / "prompts.jsonl", prompts, np.unique(order).tolist()),
        "validation": _rows(folder / "validation.jsonl", validation, range(count)),
        "order": order.tolist(),
        "sizes": chunks(settings.rollouts, settings.chunk),
        "eval_every": settings.eval_every,
        "grad_norm": settings.grad_norm,
        "threads": settings.threads,
        "weights": str(folder / WEIGHTS),
        "check": _check(model, codec, prompts),
    }
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def prompt_order(count: int, settings: TrlxSettings) -> np.ndarray:
    """Return the prompts of all rollouts, in the order in which the native engine takes them."""
    return np.concatenate(
        [
            batch_index(count, settings.rollouts, settings.seed, iteration)
            for iteration in range(settings.iterations)
        ]
    )


def _rows(path: Path, prompts: TokenizedPrompts, numbers: Iterable[int]) -> str:
    with path.open("w", encoding="utf-8") as file:
        for number in numbers:
            row = {"index": number, "ids": prompts.prompt[number].tolist()}
            file.write(json.dumps(row) + "\n")
    return str(path)


@torch.no_grad()
def _check(model: PreTrainedModel, codec: Codec, prompts: TokenizedPrompts) -> dict[str, Any]:
    """Return what the worker must find when it reads model and tokenizer.

    Prompts and responses as ids, and the log-probabilities [S - 1] of a prompt's tokens in nats.
    """
    ids = [*prompts.prompt[0].tolist(), codec.eos_id]
    tokens = torch.tensor([ids])
    logits = model.eval()(tokens).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
    columns = (prompts.prompt, prompts.original)
    count = min(_CHECKED, len(prompts))
    texts = [codec.decode(column[row].tolist()) for row in range(count) for column in columns]
    text_ids = codec.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {
        "ids": ids,
        "logprobs": logprobs.flatten().tolist(),
        "texts": texts,
        "text_ids": text_ids,
    }
