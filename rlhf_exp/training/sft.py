"""Supervised fine-tuning: imitate demonstrations, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.losses import language_model_loss
from rlhf_exp.batch import Demonstrations, to_device
from rlhf_exp.config.training import SftConfig
from rlhf_exp.data.batching import (
    PackedRow,
    batch_index,
    demonstrations_batch,
    length_sorted_micro_batches,
)
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.result import EvaluationResult
from rlhf_exp.training.task import SingleStepTask


class SftTask(SingleStepTask):
    """SFT's training task.

    Args:
        policy: The model, without a value head.
        rows: Packed training rows.
        validation: Packed validation rows.
        section: Sizes, and the seed of the order of rows.
        world: The processes.
    """

    def __init__(
        self,
        policy: Policy,
        rows: Sequence[PackedRow],
        validation: Sequence[PackedRow],
        section: SftConfig,
        world: World,
    ) -> None:
        super().__init__(policy, world)
        self.rows, self.validation, self.section = rows, validation, section
        self._since = time.perf_counter()

    def _losses(self, step: int) -> Iterator[Tensor]:
        """Yield each micro-batch's part (0-dim) of the loss of optimizer step `step`."""
        chosen = batch_index(len(self.rows), self.section.batch, self.section.seed, step)
        share = self.world.share(len(chosen))
        rows = [self.rows[number] for number in chosen[share.rows]]
        parts = _micro_batches(rows, share.weights, self.section.micro_batch)
        targets = sum((weights.sum() for _, weights in parts), torch.zeros(()))
        normaliser = self.world.sum(targets.to(self.world.device))
        for batch, weights in self.world.micro_batches(parts):
            total = self._negative_logprob(batch, weights)
            yield total / normaliser
            self.meters.add("loss/total", total, weights.sum())
        self.meters.add("throughput/tokens_per_s", targets, 0.0)

    def _negative_logprob(self, batch: Demonstrations, weights: Tensor) -> Tensor:
        """Return the weighted sum (0-dim) of the negative log-probabilities of all targets."""
        with self.world.autocast():
            logprobs = self._forward(batch.to(self.world.device))
        return language_model_loss(logprobs, to_device(weights, self.world.device), 1.0)

    def metrics(self) -> dict[str, float]:
        """Return the mean loss a token and the speed since the last call."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self.meters.add("throughput/tokens_per_s", 0.0, elapsed / self.world.processes)
        return self.meters.means()

    @torch.no_grad()
    def evaluate(self) -> EvaluationResult:
        """Return the loss a token and the perplexity on validation rows."""
        began = time.perf_counter()
        meters = MetricAccumulator(self.world)
        share = self.world.share(len(self.validation))
        rows = [self.validation[number] for number in share.rows]
        size = self.section.micro_batch or self.section.batch
        for batch, weights in _micro_batches(rows, share.weights, size):
            meters.add("eval/loss", self._negative_logprob(batch, weights), weights.sum())
        loss = meters.means()["eval/loss"]
        self._since += time.perf_counter() - began
        return EvaluationResult(
            {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 50.0))}, -loss
        )


def _micro_batches(
    rows: Sequence[PackedRow], weights: np.ndarray, size: int | None
) -> list[tuple[Demonstrations, Tensor]]:
    """Return batches with the weight [N] float32 of each of their N targets."""
    batches = []
    for part in length_sorted_micro_batches(torch.tensor([len(row) for row in rows]), size):
        batch = demonstrations_batch([rows[i] for i in part.tolist()])
        each = torch.from_numpy(weights)[part].repeat_interleave(batch.target_mask.sum(1))
        batches.append((batch, each))
    return batches
