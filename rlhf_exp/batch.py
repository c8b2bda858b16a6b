"""Typed batches, the data that models, rollout, losses and training exchange.

Dimensions: B rows, S tokens of a row (prompt and response), P prompt tokens, T response tokens,
D hidden width.

Every batch of whole sequences is **right-padded** and has lengths; padding is never recognised by
its token id. No token of a causal model sees the tokens to its right, so no attention mask is
needed, and a tokenizer may use its end-of-sequence token as padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Self

import torch
from torch import Tensor


class FinishReason(IntEnum):
    """Why a response ended."""

    LENGTH = 0
    EOS = 1
    STOP = 2


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Return `values` on `device`; the host does not wait for a copy to a GPU.

    It goes by way of pinned memory: a copy from other memory waits for all that the GPU has to do.
    """
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Batch:
    """Base of all batches: selecting rows and moving between devices.

    Subclasses are dataclasses whose fields are tensors with rows first, or `None`.
    """

    def __len__(self) -> int:
        """Return the number of rows."""
        raise NotImplementedError

    def select(self, index: Tensor | slice) -> Self:
        """Return the batch of the rows at `index` ([N] int64, or a slice)."""
        return self.map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with every tensor on `device`."""
        return self.map(lambda value: to_device(value, device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the batch with `function` applied to every tensor."""
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Prompts(Batch):
    """Prompts to answer.

    Attributes:
        tokens: [B, P] int64, right-padded.
        lengths: [B] int64, tokens of each prompt.
        index: [B] int64, number of the prompt in its set.
        rollout: [B] int64, number of the response in the whole run; with the seed and the position
            of a token it determines the noise of sampling.
    """

    tokens: Tensor
    lengths: Tensor
    index: Tensor
    rollout: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Demonstrations(Batch):
    """Packed (or padded) sequences to imitate.

    Attributes:
        tokens: [B, S] int64, right-padded.
        positions: [B, S] int64, starting at 0 in every packed sequence.
        segments: [B, S] int64, 1, 2, ... for the packed sequences of a row, 0 for padding.
        target_mask: [B, S] bool, True where token t is to be predicted from those before it; never
            True at the first token of a sequence.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    target_mask: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Preferences(Batch):
    """Pairs of whole sequences, the first preferred to the second.

    Attributes:
        chosen: [B, S] int64, right-padded.
        chosen_lengths: [B] int64.
        rejected: [B, S] int64, right-padded.
        rejected_lengths: [B] int64.
        weights: [B] float32, 0 for a padding row.
    """

    chosen: Tensor
    chosen_lengths: Tensor
    rejected: Tensor
    rejected_lengths: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.chosen.shape[0]


@dataclass(frozen=True)
class Samples(Batch):
    """Sampled responses with their prompts.

    Attributes:
        tokens: [B, S] int64, prompt then response, right-padded. The response is what was sampled,
            token for token: an end-of-sequence token or the tokens of a stop string included.
        prompt_lengths: [B] int64.
        response_lengths: [B] int64, at least 1.
        content_lengths: [B] int64, response tokens without the end-of-sequence token or stop string
            that ended it; may be 0.
        finish: [B] int64, a `FinishReason`.
        index: [B] int64, number of the prompt in its set.
        logprobs: [B, T] float32, log-probability of each response token under the sampler, at the
            sampling temperature; column t is the t-th response token, 0 beyond the end.
        states: [B, S, D] hidden states entering the first training block, right-padded like
            `tokens`; `None` unless the sampler returns them. The last token of a response was
            sampled but never fed to the model, so its state is 0; no log-probability needs it.
            Where `closing` is given and the last token is content, its state is known.
        closing: [B, D] the hidden state of an end-of-sequence token after the content, where a
            reward model reads its score; `None` unless the sampler returns it.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    content_lengths: Tensor
    finish: Tensor
    index: Tensor
    logprobs: Tensor
    states: Tensor | None = None
    closing: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Rollouts(Batch):
    """One iteration's experience, complete for training.

    Attributes:
        tokens: [B, S] int64, prompt then response, right-padded.
        prompt_lengths: [B] int64.
        response_lengths: [B] int64.
        mask: [B, T] bool, True on response tokens.
        logprobs: [B, T] float32, under the policy that sampled.
        values: [B, T] float32, of the value function at the time of sampling; `None` without one.
        advantages: [B, T] float32, of each token.
        returns: [B, T] float32, what values are trained towards; `None` without a value function.
        weights: [B] float32, 0 for a padding row.
        ref_logprobs: [B, T] float32 of the reference, where the KL penalty is in the loss.
        states: [B, S, D] as in `Samples`, or `None`.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    ref_logprobs: Tensor | None = None
    states: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]
