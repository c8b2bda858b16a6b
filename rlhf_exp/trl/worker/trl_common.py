"""What TRL's three trainers have in common here: the model, the order of rows, the evaluations.

The algorithms are TRL's own. What is added: rows come in a given order, learning rates as they are
given, and evaluations and saved weights when they are due.

n rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from engine_line import Stopped, WorkerChannel, rows, until_ended
from engine_model import peak_bytes, save_weights
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
)


def load_model(plan: dict[str, Any]) -> PreTrainedModel:
    """Return the model to train, in float32, with the parameters that train."""
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32)
    trained = set(plan["trained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def load_tokenizer(plan: dict[str, Any]) -> Any:  # noqa: ANN401 - of another transformers
    """Return the tokenizer; padding is masked, so any token will do for it."""
    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def training_arguments(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the trainer's config."""
    folder = Path(plan["weights"]).parent / "trainer"
    return {
        **plan["arguments"],
        "output_dir": str(folder),
        "use_cpu": not torch.cuda.is_available(),
    }


class Order(Sampler[int]):
    """Row numbers as they are given."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


class Handed:
    """A trainer's part that is the same for all of TRL's; mixed into one of them.

    Attributes:
        line: To the process that started this one.
        plan: The plan, as `rlhf_exp.trl.plan` wrote it.
    """

    line: WorkerChannel
    plan: dict[str, Any]
    optimizer: Any
    lr_scheduler: Any

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return a schedule of the rates that are given."""
        rates = self.plan["rates"]
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: rates[min(step, len(rates) - 1)]
        )
        return self.lr_scheduler


class Evaluations(TrainerCallback):
    """Evaluates, reports and saves a trainer's model.

    Args:
        trainer: A `Handed` trainer.
    """

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401 - of another library
        self.trainer, self.line, self.plan = trainer, trainer.line, trainer.plan
        self.validation = rows(self.plan["validation"])
        self.last_eval, self.began, self.updating, self.rate = 0, 0.0, 0.0, 0.0
        self.reference = trainer.ref_model
        if self.reference is None:  # without a penalty TRL needs none
            loaded = AutoModelForCausalLM.from_pretrained(self.plan["model"], dtype=torch.float32)
            self.reference = loaded.to(trainer.accelerator.device).eval()

    @property
    def model(self) -> PreTrainedModel:
        """The model in training."""
        model: PreTrainedModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model

    def on_train_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the library's
        """Say how much there is to train, and evaluate the model as it is given."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        trainable = sum(size for size, trains in sizes if trains)
        self.line.send(kind="ready", parameters=sum(size for size, _ in sizes), trainable=trainable)
        self.evaluate(0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Note the time, and the step's learning rate: TRL logs the next one's."""
        self.began, self.rate = perf_counter(), self.trainer.optimizer.param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Evaluate at the end of an iteration if that is due."""
        self.updating = perf_counter() - self.began
        step, every = state.global_step, self.plan["eval_every"]
        due = step // every > self.last_eval // every and step % self.plan["updates"] == 0
        if due or step >= state.max_steps:
            self.last_eval = step
            self.evaluate(step)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ANN401
        """Send what TRL logs."""
        numbers = {name: float(value) for name, value in more["logs"].items() if value is not None}
        numbers |= {"time/update": self.updating, "peak": float(peak_bytes())}
        numbers["learning_rate"] = self.rate
        self.line.send(kind="log", step=state.global_step, stats=numbers)

    def evaluate(self, step: int) -> None:
        """Have the model judged, save it if told so, and stop if told so."""
        training = self.model.training
        self.model.eval()
        # The same noise each time, and training's own is not moved.
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.plan["seed"])
            answer = self.judged(step)
        self.model.train(training)
        if answer["save"]:
            save_weights(self.model.named_parameters(), Path(self.plan["weights"]))
        if answer["stop"]:
            raise Stopped

    def judged(self, step: int) -> dict[str, Any]:
        """Return what the other end says to the model as it is."""
        raise NotImplementedError

    def answers(self) -> list[list[int]]:
        """Return an answer to each validation prompt, with the tokens that ended it."""
        plan, tokenizer = self.plan, self.trainer.processing_class
        config = GenerationConfig(
            max_new_tokens=plan["max_new_tokens"],
            do_sample=True,
            temperature=plan["temperature"],
            top_p=1.0,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=plan["end_ids"],
        )
        found = []
        for start in range(0, len(self.validation), plan["generation_batch"]):
            batch = self.validation[start : start + plan["generation_batch"]]
            inputs = tokenizer.pad(
                [{"input_ids": row["ids"]} for row in batch],
                padding_side="left",
                return_tensors="pt",
            ).to(self.trainer.accelerator.device)
            model: Any = self.model
            drawn = model.generate(**inputs, generation_config=config)
            found += drawn[:, inputs["input_ids"].shape[1] :].tolist()
        return [cut(ids, plan, tokenizer) for ids in found]

    def log_ratios(
        self, prompts: list[list[int]], answers: list[list[int]], temperature: float
    ) -> list[float]:
        """Return the sum of log policy - log reference over each answer, in nats.

        Args:
            prompts: Tokens.
            answers: Tokens of an answer to each.
            temperature: Divides the logits: the one that answers were sampled at, or 1.
        """
        policy, reference = (
            self._logprobs(model, prompts, answers, temperature)
            for model in (self.model, self.reference)
        )
        return [float((own - ref).sum()) for own, ref in zip(policy, reference, strict=True)]

    def _logprobs(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        answers: list[list[int]],
        temperature: float,
    ) -> Iterator[Tensor]:
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([prompt + answer], device=self.trainer.accelerator.device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits.float() / temperature).log_softmax(-1)
            yield logprobs.gather(-1, tokens[0, len(prompt) :, None]).squeeze(1)


def cut(ids: list[int], plan: dict[str, Any], tokenizer: Any) -> list[int]:  # noqa: ANN401
    """Return a response up to where it ended."""

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    return until_ended(ids, plan["end_ids"], decode, plan["stop_strings"])
