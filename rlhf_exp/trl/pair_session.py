"""The conversation with TRL's worker that trains on pairs: its evaluations are judged here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from rlhf_exp.algo.losses import dpo_loss
from rlhf_exp.config.training import DpoConfig
from rlhf_exp.engines.conversation import WeightSelection, check_loss, converse
from rlhf_exp.engines.process import EngineProcess
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.training.result import TrainingResult
from rlhf_exp.trl.metrics import LOSS, pair_metrics


class PairSession:
    """Serves a worker until it is done.

    Args:
        process: The worker, greeted.
        steps: Optimizer steps of the run.
        lengths: [n, 2] tokens of the responses of each validation pair.
        split: Returns the content of a response and whether it has ended.
        section: Hyperparameters, also how the weights to publish are selected.
        tracker: Records the metrics.
        before_write: Called before weights are saved; raises if this process may no longer write.
        on_step: Told the step and the latest metrics, for a progress display.
        given_up: Whether a search gives the run up, asked after each evaluation with the step and
            the number of steps; `None`: there is no search.
    """

    def __init__(
        self,
        process: EngineProcess,
        steps: int,
        lengths: Tensor,
        split: Callable[[list[int]], tuple[list[int], bool]],
        section: DpoConfig,
        tracker: Tracker,
        before_write: Callable[[], None],
        on_step: Callable[[int, Mapping[str, float]], None],
        given_up: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.process, self.steps, self.lengths, self.split = process, steps, lengths, split
        self.section, self.tracker, self.before_write = section, tracker, before_write
        self.on_step, self.given_up = on_step, given_up
        self.facts: dict[str, int] = {}
        self._selection = WeightSelection(section.select, steps)

    def run(self, plan: Path) -> TrainingResult:
        """Let the worker carry out the plan.

        Raises:
            Diverged: A loss is not finite.
            UserError: The worker has failed.
        """
        handlers: dict[str, Callable[..., None]] = {
            "ready": self._ready,
            "log": self._log,
            "evaluated": self._evaluated,
        }
        converse(self.process, plan, handlers)
        return self._selection.outcome(self.tracker)

    def _ready(self, parameters: int, trainable: int) -> None:
        self.facts |= {"parameters": parameters, "trainable": trainable}

    def _log(self, step: int, stats: dict[str, float]) -> None:
        if LOSS not in stats:  # TRL's summary of the run
            return
        check_loss(stats[LOSS], step, self.tracker, "Try a lower learning rate")
        self._selection.step = step
        metrics = pair_metrics(stats, self.section.length_normalised)
        self.tracker.log(metrics, step)
        self.on_step(step, metrics)

    def _evaluated(
        self, step: int, ratios: list[list[float]], ids: list[list[int]], kl: list[float]
    ) -> None:
        """Report an evaluation; say whether to save the weights, and whether to go on.

        Args:
            step: Optimizer steps done.
            ratios: [n, 2] log pi - log pi_ref of both sides of the validation pairs.
            ids: Answers to the validation prompts.
            kl: Sum of log pi - log pi_ref of each.
        """
        metrics = self._pair_metrics(torch.tensor(ratios))
        if ids:
            metrics |= {
                "eval/kl_sequence": fmean(kl),
                "eval/length_mean": fmean(map(len, ids)),
                "eval/ended_fraction": fmean(self.split(row)[1] for row in ids),
            }
        self.tracker.log(metrics, step, more=step > 0)
        selection = self._selection
        save = selection.takes(metrics, -metrics["eval/loss"], step)
        if save:
            self.before_write()
        selection.pruned = self.given_up is not None and self.given_up(step, self.steps)
        self.process.send(save=save, stop=selection.pruned)
        self.on_step(step, metrics)

    def _pair_metrics(self, ratios: Tensor) -> dict[str, float]:
        section, count = self.section, len(ratios)
        if section.length_normalised:
            ratios = ratios / self.lengths
        loss, stats = dpo_loss(
            ratios[:, 0],
            ratios[:, 1],
            torch.ones(count),
            float(count),
            section.beta,
            section.loss.value,
        )
        return {
            "eval/loss": float(loss),
            "eval/accuracy": float(stats.correct / count),
            "eval/reward_chosen": float(stats.chosen / count),
            "eval/reward_rejected": float(stats.rejected / count),
            "eval/margin": float((stats.chosen - stats.rejected) / count),
        }
