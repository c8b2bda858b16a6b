"""DPO by TRL: pairs as ids and in a given order."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from engine_line import WorkerChannel, rows
from trl import DPOConfig, DPOTrainer
from trl_common import Evaluations, Handed, Order, load_model, load_tokenizer, training_arguments


class PairEvaluations(Evaluations):
    """The log-ratios of validation pairs, and answers to validation prompts with their KL."""

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401 - of another library
        super().__init__(trainer)
        self.pairs = rows(self.plan["validation_pairs"])

    def judged(self, step: int) -> dict[str, Any]:
        """See `Evaluations`."""
        prompts = [pair["prompt_ids"] for pair in self.pairs]
        sides = [
            self.log_ratios(prompts, [pair[side] for pair in self.pairs], temperature=1.0)
            for side in ("chosen_ids", "rejected_ids")
        ]
        answers = self.answers()
        asked = [row["ids"] for row in self.validation]
        kl = self.log_ratios(asked, answers, self.plan["temperature"])
        ratios = [list(pair) for pair in zip(*sides, strict=True)]
        return self.line.ask(kind="evaluated", step=step, ratios=ratios, ids=answers, kl=kl)


class HandedDpo(Handed, DPOTrainer):
    """DPO."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Return the pairs as they are: as ids."""
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> Order:  # noqa: ANN401
        return Order(self.plan["order"])


def train(line: WorkerChannel, plan: dict[str, Any]) -> None:
    """Train as the plan says."""
    Handed.line, Handed.plan = line, plan
    trainer = HandedDpo(
        model=load_model(plan),
        args=DPOConfig(**training_arguments(plan)),
        train_dataset=Dataset.from_list(rows(plan["pairs"])),
        processing_class=load_tokenizer(plan),
    )
    trainer.add_callback(PairEvaluations(trainer))
    trainer.train()
