"""Direct preference optimisation: a policy learns from pairs, without a reward model or sampling.

The policy itself is the reward model: r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)), and the loss
asks that the preferred response has the higher one. The reference's log-probabilities never change,
so they are computed once before training.

Source: Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290). Both sides of a pair go through one
forward pass, each in a row of its own or packed with others. n pairs, T response tokens, N response
tokens of all sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.losses import DpoStats, dpo_loss
from rlhf_exp.batch import Demonstrations
from rlhf_exp.config.training import DpoConfig
from rlhf_exp.data.batching import (
    batch_index,
    length_sorted_micro_batches,
    pack_pairs,
    packed_pair_parts,
    pair_lengths,
    response_lengths,
    right_padded,
)
from rlhf_exp.data.tokenized import TokenizedPreferences
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy, ResponseOutputs
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.result import EvaluationResult
from rlhf_exp.training.task import SingleStepTask


class ResponseModel(Protocol):
    """Log-probabilities of responses: a policy's or a `Reference`'s."""

    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        temperature: float,
    ) -> Tensor:
        """Return [rows, T] float32; arguments as in `Policy.response_outputs`."""
        ...

    def target_logprobs(self, batch: Demonstrations) -> Tensor:
        """Return those of packed rows, [N] float32."""
        ...


class DpoTask(SingleStepTask):
    """DPO's training task.

    Args:
        policy: The policy, without a value head.
        pairs: Training pairs.
        ref_logprobs: [pairs, 2] float32, of the reference: chosen and rejected responses.
        validation: Validation pairs.
        validation_ref_logprobs: The same of these.
        sampled: Reports on answers to validation prompts by the policy as it is.
        section: Sizes and coefficients.
        world: The processes.
    """

    def __init__(
        self,
        policy: Policy,
        pairs: TokenizedPreferences,
        ref_logprobs: Tensor,
        validation: TokenizedPreferences,
        validation_ref_logprobs: Tensor,
        sampled: Callable[[MetricAccumulator], object],
        section: DpoConfig,
        world: World,
    ) -> None:
        super().__init__(policy, world)
        self.pairs, self.ref_logprobs = pairs, ref_logprobs
        self.validation, self.validation_ref_logprobs = validation, validation_ref_logprobs
        self.sampled, self.section = sampled, section

    def _losses(self, step: int) -> Iterator[Tensor]:
        """Yield each micro-batch's part (0-dim) of the loss of optimizer step `step`."""
        section = self.section
        chosen = batch_index(len(self.pairs), section.batch, section.seed, step)
        share = self.world.share(len(chosen))
        rows, weights = chosen[share.rows], torch.from_numpy(share.weights)
        parts = pair_micro_batches(self.pairs, chosen, section, section.micro_batch, self.world)
        for part in self.world.micro_batches(parts):
            index = rows[part.numpy()]
            ratios = self._log_ratios(self.pairs, index, self.ref_logprobs)
            weight = weights[part].to(self.world.device)
            loss, stats = self._pair_loss(ratios, weight, float(len(chosen)))
            yield loss
            self.meters.add("loss/total", loss * len(chosen), stats.count)
            self.meters.add("dpo/accuracy", stats.correct, stats.count)
            self.meters.add("dpo/reward_chosen", stats.chosen, stats.count)
            self.meters.add("dpo/reward_rejected", stats.rejected, stats.count)
            self.meters.add("dpo/margin", stats.chosen - stats.rejected, stats.count)

    def _pair_loss(
        self, ratios: Tensor, weights: Tensor, normaliser: float
    ) -> tuple[Tensor, DpoStats]:
        section = self.section
        return dpo_loss(
            ratios[:, 0],
            ratios[:, 1],
            weights,
            normaliser,
            section.beta,
            section.loss.value,
            section.label_smoothing,
        )

    def _log_ratios(
        self, pairs: TokenizedPreferences, rows: np.ndarray, ref_logprobs: Tensor
    ) -> Tensor:
        """Return log pi - log pi_ref [n, 2] of both sides, by token with `length_normalised`."""
        with self.world.autocast():
            model = _Wrapped(self._forward)
            logprobs = pair_logprobs(model, pairs, rows, self.section, self.world.device)
        ratios = logprobs - ref_logprobs[torch.from_numpy(rows)].to(logprobs.device)
        if self.section.length_normalised:
            ratios = ratios / response_lengths(pairs, rows).to(ratios.device)
        return ratios

    @torch.no_grad()
    def evaluate(self) -> EvaluationResult:
        """Return loss, accuracy and rewards on validation pairs, and metrics of answers."""
        section, pairs, count = self.section, self.validation, len(self.validation)
        share = self.world.share(count)
        ratios = torch.zeros(len(share.rows), 2)
        size = section.micro_batch or section.batch
        everything = np.arange(count)
        for part in pair_micro_batches(pairs, everything, section, size, self.world):
            found = self._log_ratios(pairs, share.rows[part.numpy()], self.validation_ref_logprobs)
            ratios[part] = found.float().cpu()
        everyone = self.world.gather(ratios).cpu()[:count]
        loss, stats = self._pair_loss(everyone, torch.ones(count), float(count))
        metrics = {
            "eval/loss": float(loss),
            "eval/accuracy": float(stats.correct / count),
            "eval/reward_chosen": float(stats.chosen / count),
            "eval/reward_rejected": float(stats.rejected / count),
            "eval/margin": float((stats.chosen - stats.rejected) / count),
        }
        meters = MetricAccumulator(self.world)
        with self.world.gathered():
            self.sampled(meters)
        metrics |= meters.means()
        return EvaluationResult(metrics, -metrics["eval/loss"])


class _Wrapped:
    """The policy through the wrapper of a strategy, which acts in `forward` alone."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        temperature: float,
    ) -> Tensor:
        outputs: ResponseOutputs = self._forward(
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            temperature=temperature,
        )
        return outputs.logprobs

    def target_logprobs(self, batch: Demonstrations) -> Tensor:
        logprobs: Tensor = self._forward(batch)
        return logprobs


def pair_micro_batches(
    pairs: TokenizedPreferences,
    rows: np.ndarray,
    section: DpoConfig,
    size: int | None,
    world: World,
) -> list[Tensor]:
    """Return the micro-batches of this process's share of `rows`, by number in the share.

    Args:
        pairs: The pairs.
        rows: [m] int64, those of all processes.
        section: Whether they are packed, and the length of a row.
        size: Pairs of a micro-batch, if they are the longest; `None`: the whole share.
        world: The processes.
    """
    if section.packing:
        shares = [rows[world.share(len(rows), rank).rows] for rank in range(world.processes)]
        return packed_pair_parts(pairs, shares, size, section.seq_length)[world.rank]
    own = rows[world.share(len(rows)).rows]
    return list(length_sorted_micro_batches(pair_lengths(pairs, own), size))


def pair_logprobs(
    model: ResponseModel,
    pairs: TokenizedPreferences,
    rows: np.ndarray,
    section: DpoConfig,
    device: torch.device,
) -> Tensor:
    """Return the summed log-probabilities [n, 2] float32 of the chosen and rejected responses.

    Args:
        model: The policy or the reference.
        pairs: The pairs.
        rows: [n] int64, which of them.
        section: Whether they are packed, and the length of a row.
        device: Of the model.
    """
    if section.packing:
        batch, side = pack_pairs(pairs, rows, section.seq_length)
        logprobs = model.target_logprobs(batch.to(device)).float()
        sums = logprobs.new_zeros(2 * len(rows)).index_add(0, side.to(device), logprobs)
        return sums.view(2, len(rows)).t()
    parts = [
        (pairs.prompt[row], side[row]) for side in (pairs.chosen, pairs.rejected) for row in rows
    ]
    tokens, _ = right_padded(parts)
    lengths = torch.tensor([[len(prompt), len(response)] for prompt, response in parts])
    logprobs = model.logprobs(
        tokens.to(device), lengths[:, 0].to(device), lengths[:, 1].to(device), temperature=1.0
    )
    return logprobs.float().sum(1).view(2, len(rows)).t()
