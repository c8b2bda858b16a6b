"""Sampling responses from a causal language model.

The loop itself is `rollout/loop.py`. What is trained on is sampled from the whole distribution, as
the distribution that is sampled must be the one that is trained; an evaluation may cut it (top-p,
top-k). Everything else that `transformers.generate` can do (beams, penalties) is left out.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.errors import UserError
from rlhf_exp.rollout.decoder import ready_to_decode
from rlhf_exp.rollout.loop import CLOSING_ROOM, DecodeLoop
from rlhf_exp.rollout.settings import Sampling
from rlhf_exp.rollout.stops import Stopper

__all__ = ["Sampling", "sample"]


def sample(
    model: PreTrainedModel,
    prompts: Prompts,
    settings: Sampling,
    seed: int,
    stopper: Stopper | None = None,
    capture: nn.Module | None = None,
    close: int | None = None,
) -> Samples:
    """Return a response to each prompt, in the prompts' order, on the model's device.

    Dropout is off meanwhile. What a row says depends on its prompt, its `rollout` number, the
    seed and the weights; on other rows and the batch only through rounding.

    Args:
        model: a causal language model (inside a peft wrapper or not).
        prompts: at least one row, each of at least one token.
        settings: how to sample.
        seed: of the noise.
        stopper: finds stop strings, or None.
        capture: a decoder block of `model`; the hidden states entering it become `Samples.states`.
        close: a token whose states after each response's content become `Samples.closing`; they do
            not where the model has no position for it.

    Raises:
        UserError: where a prompt and its response exceed the model's positions.
    """
    unwrap = getattr(model, "get_base_model", None)
    if unwrap is not None:
        model = unwrap()
    limits = _limits(model)
    _check(limits, prompts, settings)
    room = min([*limits.values(), math.inf]) - int(prompts.lengths.max()) - settings.max_new_tokens
    close = close if capture is not None and room >= CLOSING_ROOM else None
    with ready_to_decode(model):
        loop = DecodeLoop(model, prompts, settings, seed, stopper, capture, close)
        with torch.inference_mode():
            loop.run()
    return loop.samples()


def _limits(model: PreTrainedModel) -> dict[str, int]:
    """Return the most tokens of a sequence, by what says so in the model's config."""
    config = model.config.get_text_config()
    limits = {"max_position_embeddings": getattr(config, "max_position_embeddings", None)}
    if getattr(config, "use_sliding_window", True):
        # Within the window sliding attention is full attention; beyond it the mask would be wrong.
        limits["sliding_window"] = getattr(config, "sliding_window", None)
    return {name: limit for name, limit in limits.items() if limit is not None}


def _check(limits: dict[str, int], prompts: Prompts, settings: Sampling) -> None:
    assert len(prompts), "no prompts"
    assert settings.max_new_tokens > 0, f"max_new_tokens {settings.max_new_tokens} is not above 0"
    assert settings.temperature > 0, f"temperature {settings.temperature} is not above 0"
    assert 0 < settings.top_p <= 1, f"top_p {settings.top_p} is not above 0 and at most 1"
    assert settings.top_k >= 0, f"top_k {settings.top_k} is below 0"
    assert int(prompts.lengths.min()) > 0, "a prompt without tokens"
    longest = int(prompts.lengths.max())
    for name, limit in limits.items():
        if longest + settings.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={settings.max_new_tokens} exceed "
                f"the model's {name}={limit}: cut prompts shorter (seq_length) or lower "
                "max_new_tokens"
            )
