"""What a worker of another interpreter is handed, and the weights that it leaves.

prompts.jsonl         {"index": 3, "ids": [...]}: the training prompts that the run meets
validation.jsonl      the same of the validation prompts
weights.safetensors   written by the worker: nothing is unpickled here
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rlhf_exp.config.training import PpoConfig
from rlhf_exp.data.batching import batch_index
from rlhf_exp.data.tokenized import RaggedArray, TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError

WEIGHTS = "weights.safetensors"
_CHECKED = 16  # texts


def prompt_order(count: int, section: PpoConfig, steps: int) -> np.ndarray:
    """Return the prompts of all iterations, in the order in which the native engine takes them."""
    return np.concatenate(
        [
            batch_index(count, section.prompts, section.seed, iteration)
            for iteration in range(steps // section.updates)
        ]
    )


def write_prompts(path: Path, prompts: TokenizedPrompts, numbers: Iterable[int]) -> str:
    """Write the prompts of these numbers; return the path."""
    with path.open("w", encoding="utf-8") as file:
        for number in numbers:
            row = {"index": number, "ids": prompts.prompt[number].tolist()}
            file.write(json.dumps(row) + "\n")
    return str(path)


@torch.no_grad()
def expected_results(
    model: PreTrainedModel, codec: Codec, prompts: RaggedArray, responses: RaggedArray
) -> dict[str, Any]:
    """Return the results that the worker must get from model and tokenizer.

    Prompts and responses as ids, and the log-probabilities [S - 1] of a prompt's tokens in nats.
    """
    ids = [*prompts[0].tolist(), codec.eos_id]
    tokens = torch.tensor([ids])
    logits = model.eval()(tokens).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
    columns = (prompts, responses)
    count = min(_CHECKED, len(prompts))
    texts = [codec.decode(column[row].tolist()) for row in range(count) for column in columns]
    text_ids = codec.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {
        "ids": ids,
        "logprobs": logprobs.flatten().tolist(),
        "texts": texts,
        "text_ids": text_ids,
    }


def take_back(
    model: PreTrainedModel, path: Path, name_of: Callable[[str], str] = lambda name: name
) -> None:
    """Copy trained weights into the model that they started from.

    Args:
        model: The model.
        path: File of the weights.
        name_of: Returns a parameter's name there.

    Raises:
        UserError: They are not this model's.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the worker left no weights that can be read ({error})") from error
    targets = {name_of(name): value for name, value in model.named_parameters()}
    shapes = [
        {name: tuple(v.shape) for name, v in tensors.items()} for tensors in (weights, targets)
    ]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise UserError(f"{path}: the worker left weights of another model (first: {odd[0]})")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])
