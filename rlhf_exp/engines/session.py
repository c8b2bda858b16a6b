"""The conversation with a worker of another interpreter that samples, and trains on its samples.

Its responses are scored here, and its evaluations are judged here. n responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.advantages import subtract_original_scores
from rlhf_exp.algo.preference import wins
from rlhf_exp.config.training import PpoConfig
from rlhf_exp.data.batching import right_padded
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.engines.conversation import WeightSelection, check_loss, converse
from rlhf_exp.engines.iteration import Dialect, Iteration
from rlhf_exp.engines.process import EngineProcess
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.training.ppo_objective import SHOWN, objective, score_unit, selection_score
from rlhf_exp.training.result import TrainingResult
from rlhf_exp.training.reward_scorer import Scorer, texts_of


@dataclass(frozen=True)
class RunInputs:
    """The scorer of responses, the prompts, and the rules for selecting weights.

    Attributes:
        scorer: Scores responses.
        prompts: The training prompts.
        originals: [prompts] float32, scores of the data set's own responses; `None`: they are not
            subtracted.
        validation: The validation prompts.
        section: Hyperparameters, also how the weights to publish are selected.
        codec: Codec of the policy.
        shape: Makes of an iteration's scores [n], less what is subtracted, those that the worker is
            told: where it does not clip and scale them itself.
        split: Returns the content of a response and whether it has ended, where the worker does not
            tell them apart.
    """

    scorer: Scorer
    prompts: TokenizedPrompts
    originals: Tensor | None
    validation: TokenizedPrompts
    section: PpoConfig
    codec: Codec
    shape: Callable[[Tensor], Tensor] = lambda scores: scores
    split: Callable[[list[int]], tuple[list[int], bool]] | None = None


@dataclass(frozen=True)
class _Answers:
    """Scored responses.

    Attributes:
        tokens: [n, S], prompt and content.
        lengths: [n, 2], of both.
        whole: Tokens of each response, with those that ended it.
        ended: [n] bool.
        raw: [n] scores.
    """

    tokens: Tensor
    lengths: Tensor
    whole: list[int]
    ended: Tensor
    raw: Tensor


class Session:
    """Serves a worker until it is done.

    Args:
        process: The worker, greeted.
        steps: Optimizer steps of the run; a whole number of iterations.
        inputs: Scorer, prompts and hyperparameters.
        dialect: What the library calls what it logs.
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
        inputs: RunInputs,
        dialect: Dialect,
        tracker: Tracker,
        before_write: Callable[[], None],
        on_step: Callable[[int, Mapping[str, float]], None],
        given_up: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.process, self.steps, self.inputs = process, steps, inputs
        self.section, self.dialect = inputs.section, dialect
        self.tracker, self.before_write = tracker, before_write
        self.on_step, self.given_up = on_step, given_up
        self.facts: dict[str, int] = {}
        self._iteration = Iteration()
        self._answers: _Answers | None = None
        self._unit: float | None = None
        self._initial: Tensor | None = None
        self._selection = WeightSelection(inputs.section.select, steps)

    def run(self, plan: Path) -> TrainingResult:
        """Let the worker carry out the plan.

        Raises:
            Diverged: A loss is not finite.
            UserError: The worker or the scorer has failed.
        """
        handlers: dict[str, Callable[..., None]] = {
            "ready": self._ready,
            "score": self._score,
            "experience": self._experience,
            "log": self._log,
            "evaluated": self._evaluated,
        }
        converse(self.process, plan, handlers)
        return self._selection.outcome(self.tracker)

    def _ready(self, parameters: int, trainable: int) -> None:
        self.facts |= {"parameters": parameters, "trainable": trainable}

    def _score(
        self,
        evaluation: bool,
        index: list[int],
        ids: list[list[int]],
        ended: list[bool] | None = None,
    ) -> None:
        """Send the scores: raw ones of an evaluation, else those to train on.

        Args:
            evaluation: Whether they are validation answers.
            index: Their prompts.
            ids: Their contents, or whole responses if `ended` is not given.
            ended: Whether each has ended.
        """
        answers = self._scored(evaluation, index, ids, ended)
        if evaluation:
            self._answers = answers
            self.process.send(scores=answers.raw.tolist())
            return
        inputs, iteration = self.inputs, self._iteration
        scores = answers.raw - self.section.reward.missing_eos_penalty * ~answers.ended
        if inputs.originals is not None:
            scores = subtract_original_scores(scores, inputs.originals[torch.tensor(index)])
            iteration.deltas += scores.tolist()
        iteration.scores += answers.raw.tolist()
        iteration.lengths += answers.whole
        iteration.parts += 1
        self.process.send(scores=inputs.shape(scores).tolist())

    def _scored(
        self, evaluation: bool, index: list[int], ids: list[list[int]], ended: list[bool] | None
    ) -> _Answers:
        inputs = self.inputs
        if ended is None:
            assert inputs.split is not None, "nothing tells contents and ends apart"
            whole = [len(row) for row in ids]
            ids, ended = (list(part) for part in zip(*map(inputs.split, ids), strict=True))
        else:
            whole = [len(row) + end for row, end in zip(ids, ended, strict=True)]
        source = inputs.validation if evaluation else inputs.prompts
        parts = [
            (source.prompt[row], np.array(answer, dtype=np.int64))
            for row, answer in zip(index, ids, strict=True)
        ]
        tokens, _ = right_padded(parts)
        lengths = torch.tensor([[len(part) for part in row] for row in parts])
        raw = inputs.scorer(tokens, lengths[:, 0], lengths[:, 1])
        return _Answers(tokens, lengths, whole, torch.tensor(ended), raw)

    def _experience(self, seconds: float, kl: list[float]) -> None:
        self._iteration.seconds, self._iteration.kl = seconds, kl

    def _log(self, step: int, stats: dict[str, float]) -> None:
        """Take in metrics that the library logs; at the end of an iteration, record them."""
        iteration, loss = self._iteration, self.dialect.loss
        if loss not in stats:
            iteration.rollouts = {**iteration.rollouts, **stats}
            return
        check_loss(
            stats[loss], step, self.tracker, "Try a lower learning rate, or a larger ppo.kl.coef"
        )
        self._selection.step = step
        iteration.updates.append(stats)
        metrics: dict[str, float] = {}
        if step % self.section.updates == 0:
            metrics = self.dialect.metrics(iteration)
            self.tracker.histogram("reward/histogram", iteration.scores, step)
            if iteration.kl:
                self.tracker.histogram("kl/histogram", list(iteration.kl), step)
            self.tracker.log(metrics, step)
            self._iteration = Iteration()
        self.on_step(step, metrics)

    def _evaluated(self, step: int, kl: list[float]) -> None:
        """Report an evaluation; say whether to save the weights, and whether to go on."""
        answers, section = self._answers, self.section
        assert answers is not None, "an evaluation has its answers scored first"
        raw: list[float] = answers.raw.tolist()
        if self._initial is None:
            self._initial = answers.raw
        metrics = {
            "eval/reward_mean": fmean(raw),
            "eval/reward_std": pstdev(raw),
            "eval/win_rate": float(wins(answers.raw, self._initial).mean()),
            "eval/kl_sequence": fmean(kl),
            "eval/length_mean": fmean(answers.whole),
            "eval/ended_fraction": float(answers.ended.double().mean()),
        }
        if self._unit is None:
            self._unit = score_unit(section, metrics)
        metrics["eval/objective"] = objective(section, metrics, self._unit)
        columns, rows = self._table(answers, kl)
        self.tracker.table("eval/samples", columns, rows, step)
        # The iteration that ends here is logged right after.
        self.tracker.log(metrics, step, more=step > 0)
        selection = self._selection
        save = selection.takes(metrics, selection_score(section, metrics, self._unit), step)
        if save:
            self.before_write()
        selection.pruned = self.given_up is not None and self.given_up(step, self.steps)
        self.process.send(save=save, stop=selection.pruned)
        self.on_step(step, metrics)

    def _table(
        self, answers: _Answers, kl: list[float]
    ) -> tuple[list[str], list[list[str | float]]]:
        tokens, lengths = answers.tokens[:SHOWN], answers.lengths[:SHOWN]
        texts = texts_of(tokens, lengths[:, 0], lengths[:, 1], self.inputs.codec)
        rows = zip(*texts, answers.raw[:SHOWN].tolist(), kl[:SHOWN], strict=True)
        return ["prompt", "response", "score", "kl"], [list(row) for row in rows]
