"""Sampled answers that are kept by content, so that another evaluation need not sample them again.

What is kept are the tokens, not their scores: the evaluation of another reward starts from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.distributed.world import World
from rlhf_exp.stages.kept_tensor import kept_tensor
from rlhf_exp.store.code_digest import code_digests
from rlhf_exp.store.fingerprint import DigestCache, key_of

_PACKAGE = Path(__file__).resolve().parents[2]
# Columns before the tokens: response tokens, those of the content, why the response ended.
_HEAD = 3


def samples_key(cache: Path, model: Path, prompts: Prompts, settings: Mapping[str, Any]) -> str:
    """Return the key of everything that decides the answers of a model to prompts.

    That is the content of the model's folder, the prompts, the settings, and the code that samples:
    unlike a result in the store, kept answers have no manifest that would tell older code.

    Args:
        cache: Folder of the digests of files and modules.
        model: The model's folder.
        prompts: [N] prompts, numbered by `rollout`.
        settings: How the answers are sampled, as JSON values.
    """
    digest = hashlib.sha256()
    for column in (prompts.tokens, prompts.lengths, prompts.rollout):
        digest.update(column.cpu().numpy().tobytes())
    return key_of(
        {
            "model": DigestCache(cache / "digests.json").folder(model),
            "prompts": [list(prompts.tokens.shape), digest.hexdigest()],
            "settings": dict(settings),
            "code": code_digests("rlhf_exp.rollout.sampler", _PACKAGE, notes=cache / "code.json"),
        }
    )


def kept_samples(
    path: Path, prompts: Prompts, count: int, sample: Callable[[], Samples], world: World
) -> Samples:
    """Return the answers to this process's prompts, from a file or sampled and then kept there.

    Args:
        path: A `.npy` file whose name tells its content from any other.
        prompts: [B] this process's prompts, numbered by `rollout` among all of them.
        count: N, prompts of all processes.
        sample: Answers this process's prompts; all processes take part.
        world: The processes.

    Returns:
        [B] answers, without log-probabilities (NaN), which nothing that scores answers reads.
    """

    def compute() -> Tensor:
        samples = sample()
        shares = world.all_gather_object((prompts.rollout.cpu(), _packed(samples)))
        width = max(rows.shape[1] for _, rows in shares)
        everything = torch.zeros((count, width), dtype=torch.int32)
        for numbers, rows in shares:
            everything[numbers] = functional.pad(rows, (0, width - rows.shape[1]))
        return everything

    rows = kept_tensor(path, "sampled answers", compute, world)
    return _unpacked(rows[prompts.rollout.cpu()].long(), prompts)


def _packed(samples: Samples) -> Tensor:
    """Return answers as rows [B, 3 + T] int32: `_HEAD` numbers, then the response's tokens."""
    head = [samples.response_lengths, samples.content_lengths, samples.finish]
    longest = int(samples.response_lengths.max())
    columns = samples.prompt_lengths[:, None] + torch.arange(longest, device=samples.tokens.device)
    within = columns.clamp(max=samples.tokens.shape[1] - 1)
    rows = torch.cat([torch.stack(head, dim=1), samples.tokens.gather(1, within)], dim=1)
    return rows.cpu().to(torch.int32)


def _unpacked(rows: Tensor, prompts: Prompts) -> Samples:
    """Undo `_packed`."""
    lengths, content, finish = rows[:, :_HEAD].unbind(dim=1)
    answers, device = rows[:, _HEAD:], prompts.tokens.device
    starts = prompts.lengths.cpu()
    tokens = torch.zeros((len(rows), int((starts + lengths).max())), dtype=torch.int64)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        tokens[row, :start] = prompts.tokens[row, :start].cpu()
        tokens[row, start : start + length] = answers[row, :length]
    return Samples(
        tokens=tokens,
        prompt_lengths=starts,
        response_lengths=lengths,
        content_lengths=content,
        finish=finish,
        index=prompts.index.cpu(),
        logprobs=torch.full(answers.shape, np.nan),
    ).to(device)
