"""The reward model: which of two responses do people prefer?

Source: Stiennon et al. 2020, Ouyang et al. 2022 (eq. 1). Both sides of a pair go through one
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.losses import pairwise_loss
from rlhf_exp.config.training import RewardConfig
from rlhf_exp.data.batching import (
    batch_index,
    length_sorted_micro_batches,
    pair_lengths,
    preferences_batch,
)
from rlhf_exp.data.tokenized import TokenizedPreferences
from rlhf_exp.distributed.world import World
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.training.result import EvaluationResult
from rlhf_exp.training.task import SingleStepTask


class RewardTask(SingleStepTask):
    """The reward model's training task.

    Args:
        model: The reward model.
        pairs: Training pairs.
        validation: Validation pairs.
        section: Sizes, and the seed of the order of pairs.
        world: The processes.
    """

    def __init__(
        self,
        model: RewardModel,
        pairs: TokenizedPreferences,
        validation: TokenizedPreferences,
        section: RewardConfig,
        world: World,
    ) -> None:
        super().__init__(model, world)
        self.model, self.section = model, section
        self.pairs, self.validation = pairs, validation

    def _losses(self, step: int) -> Iterator[Tensor]:
        """Yield each micro-batch's part (0-dim) of the loss of optimizer step `step`."""
        chosen = batch_index(len(self.pairs), self.section.batch, self.section.seed, step)
        share = self.world.share(len(chosen))
        rows, weights = chosen[share.rows], share.weights
        parts = length_sorted_micro_batches(
            pair_lengths(self.pairs, rows), self.section.micro_batch
        )
        for part in self.world.micro_batches(parts):
            first, second, weight = self.scores(
                self.pairs, rows[part.numpy()], weights[part.numpy()]
            )
            loss, stats = pairwise_loss(first, second, weight, float(len(chosen)))
            yield loss
            self.meters.add("loss/total", loss * len(chosen), stats.count)
            self.meters.add("reward/accuracy", stats.correct, stats.count)
            self.meters.add("reward/margin", ((first - second) * weight).sum(), stats.count)

    def scores(
        self, pairs: TokenizedPreferences, rows: np.ndarray, weights: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return both sides' scores and the weights, each [rows], of the pairs at `rows`."""
        batch = preferences_batch(pairs, rows, weights).to(self.world.device)
        with self.world.autocast():
            chosen, rejected = self._forward(batch)
        return chosen, rejected, batch.weights

    def evaluate(self) -> EvaluationResult:
        """Return loss, accuracy and margin on validation pairs."""
        first, second = pair_scores(self.scores, self.validation, self.section, self.world)
        loss, stats = pairwise_loss(first, second, torch.ones_like(first), float(len(first)))
        metrics = {
            "eval/loss": float(loss),
            "eval/accuracy": float(stats.correct / stats.count),
            "eval/margin": float((first - second).mean()),
        }
        return EvaluationResult(metrics, -metrics["eval/loss"])


@torch.no_grad()
def pair_scores(
    score: Callable[..., tuple[Tensor, Tensor, Tensor]],
    pairs: TokenizedPreferences,
    section: RewardConfig,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Return the scores [pairs] float32 of both sides of all pairs, on the CPU."""
    share = world.share(len(pairs))
    scores = torch.zeros(len(share.rows), 2)
    size = section.micro_batch or section.batch
    for part in length_sorted_micro_batches(pair_lengths(pairs, share.rows), size):
        first, second, _ = score(pairs, share.rows[part.numpy()], share.weights[part.numpy()])
        scores[part] = torch.stack([first, second], dim=1).float().cpu()
    everyone = world.gather(scores).cpu()[: len(pairs)]
    return everyone[:, 0], everyone[:, 1]
