"""RLOO and GRPO by TRL: prompts as ids and in a given order, scores by the other end."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from engine_line import WorkerChannel, rows
from engine_model import TOLERANCE
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl_common import (
    Evaluations,
    Handed,
    Order,
    cut,
    load_model,
    load_tokenizer,
    training_arguments,
)


class RolloutEvaluations(Evaluations):
    """Answers are scored by the other end, and their KL to the reference is measured."""

    def judged(self, step: int) -> dict[str, Any]:
        """See `Evaluations`."""
        answers = self.answers()
        index = [row["index"] for row in self.validation]
        self.line.ask(kind="score", evaluation=True, index=index, ids=answers)
        asked = [row["ids"] for row in self.validation]
        kl = self.log_ratios(asked, answers, self.plan["temperature"])
        return self.line.ask(kind="evaluated", step=step, kl=kl)


class HandedRollouts(Handed):
    """Mixed into TRL's trainers that sample.

    Attributes:
        prompts: The training prompts, rows of `prompts.jsonl`.
    """

    prompts: list[dict[str, Any]]
    _seen: dict[str, Tensor]
    _seconds: dict[str, float]

    def _get_train_sampler(self: Any, dataset: Any = None) -> Order:  # noqa: ANN401
        """Return each iteration's prompts: k times each, and again for each of its steps."""
        numbers = {row["index"]: number for number, row in enumerate(self.prompts)}
        order = [numbers[index] for index in self.plan["order"]]
        each = self.num_generations
        size = self.args.generation_batch_size // each
        repeats = self.num_iterations * self.args.steps_per_generation
        found: list[int] = []
        for start in range(0, len(order), size):
            for _ in range(repeats):
                found += [row for row in order[start : start + size] for _ in range(each)]
        return Order(found)

    def _tokenize_prompts(self: Any, prompts: list[str]) -> tuple[Any, ...]:
        return [self.prompts[int(number)]["ids"] for number in prompts], None, {}

    def _generate_single_turn(self: Any, *arguments: Any) -> Any:  # noqa: ANN401
        """Cut each response at its stop string."""
        began = perf_counter()
        found = super()._generate_single_turn(*arguments)
        responses, *more = found if isinstance(found, tuple) else (found,)
        responses = [cut(ids, self.plan, self.processing_class) for ids in responses]
        self._seconds["sample"] = perf_counter() - began
        return (responses, *more) if more else responses

    def _get_per_token_logps_and_entropies(self: Any, model: Any, *more: Any, **kw: Any) -> Any:  # noqa: ANN401
        """Keep the log-probabilities of what was sampled."""
        found = super()._get_per_token_logps_and_entropies(model, *more, **kw)
        if not torch.is_grad_enabled():
            self._seen["reference" if model is self.ref_model else "policy"] = found[0]
        return found

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:  # noqa: ANN401
        """Say how long it took, and how far the policy is from the reference."""
        began, self._seen, self._seconds = perf_counter(), {}, {}
        output = super()._generate_and_score_completions(inputs)
        if "reference" in self._seen and "policy" not in self._seen:
            tokens, mask = (
                torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], 1)
                for name in ("ids", "mask")
            )
            width = output["completion_ids"].shape[1]
            with torch.no_grad():  # TRL needs none where the first update is the only one
                self._get_per_token_logps_and_entropies(self.model, tokens, mask, width)
        kl: list[float] = []
        if "reference" in self._seen:
            ratios = self._seen["policy"] - self._seen["reference"]
            kl = (ratios * output["completion_mask"]).sum(1).tolist()
        stats = {f"time/{name}": value for name, value in self._seconds.items()}
        self.line.send(kind="log", step=self.state.global_step, stats=stats)
        self.line.send(kind="experience", seconds=perf_counter() - began, kl=kl)
        return output


class HandedRloo(HandedRollouts, RLOOTrainer):
    """RLOO."""


class HandedGrpo(HandedRollouts, GRPOTrainer):
    """GRPO."""


KINDS = {"rloo": (RLOOConfig, HandedRloo), "grpo": (GRPOConfig, HandedGrpo)}


@torch.no_grad()
def check_padding(model: Any, ids: list[int]) -> None:  # noqa: ANN401 - of another transformers
    """Check that a prompt padded on the left is the prompt: TRL tells no positions.

    Raises:
        ValueError: The model's positions are not relative.
    """
    alone, padded = torch.tensor([ids]), torch.tensor([[0, 0, 0, *ids]])
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    expected = model(input_ids=alone).logits[0].log_softmax(-1)
    found = model(input_ids=padded, attention_mask=mask).logits[0, 3:].log_softmax(-1)
    error = float((found - expected).abs().max())
    if not error < TOLERANCE:
        raise ValueError(
            f"log-probabilities of a prompt padded on the left, as TRL does it, are off by "
            f"{error:.3g} nats; use engine=native, or a model with rotary positions"
        )


def train(line: WorkerChannel, plan: dict[str, Any]) -> None:
    """Train as the plan says."""
    config, kind = KINDS[plan["algorithm"]]
    prompts, model = rows(plan["prompts"]), load_model(plan)
    check_padding(model, prompts[0]["ids"])
    HandedRollouts.line, HandedRollouts.plan, HandedRollouts.prompts = line, plan, prompts
    trainer: Any = None

    def score(
        prompts: list[str],
        completion_ids: list[list[int]],
        **_: Any,  # noqa: ANN401 - the library's
    ) -> list[float]:
        began = perf_counter()
        index = [trainer.prompts[int(number)]["index"] for number in prompts]
        answer = line.ask(kind="score", evaluation=False, index=index, ids=completion_ids)
        trainer._seconds["score"] = perf_counter() - began
        scores: list[float] = answer["scores"]
        return scores

    trainer = kind(
        model=model,
        reward_funcs=score,
        args=config(**training_arguments(plan)),
        # A prompt is its number: `_tokenize_prompts` returns its ids.
        train_dataset=Dataset.from_list([{"prompt": str(n)} for n in range(len(prompts))]),
        processing_class=load_tokenizer(plan),
    )
    trainer.add_callback(RolloutEvaluations(trainer))
    trainer.train()
