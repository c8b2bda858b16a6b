"""trlx's PPO trainer, reporting to a line and saving when it is told to.

The algorithm is trlx's own. What is added: prompts come as token ids and in a given order;
gradients are clipped, as DeepSpeed does it in the published runs; and where every block trains the
reference is a whole copy, which is what trlx has code for (it asks for an attribute that is always
there, and takes a branch that leaves the first block out instead).

n rows, S tokens of a row.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from engine_line import Stopped, WorkerChannel, until_ended
from engine_model import peak_bytes, save_weights
from torch.utils.data import DataLoader
from trlx.data.configs import TRLConfig
from trlx.pipeline import BasePipeline, register_datapipeline
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer
from trlx.utils.modeling import RunningMoments, logprobs_of_labels


@register_datapipeline
class HandedPrompts(BasePipeline):
    """Prompts as ids, in batches of given sizes.

    Args:
        prompts: `rows` with `ids`, `index` and `evaluation`; and `sizes` of the batches that they
            are cut into, again and again.
        max_prompt_length: Not needed: the ids are cut to length.
        tokenizer: Pads on the left.
        add_special_tokens: Not needed: they are among the ids.
    """

    def __init__(
        self,
        prompts: dict[str, Any],
        max_prompt_length: int,
        tokenizer: Any,  # noqa: ANN401 - of another transformers
        add_special_tokens: bool = False,
    ) -> None:
        self.prompts, self.sizes, self.tokenizer = prompts["rows"], prompts["sizes"], tokenizer

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self.prompts[number]
        return row

    def create_loader(self, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        """Return the batches; size and order are settled, whatever trlx would like."""
        batches: list[list[int]] = []
        start, count = 0, len(self.prompts)
        while start < count:
            end = min(start + self.sizes[len(batches) % len(self.sizes)], count)
            batches.append(list(range(start, end)))
            start = end
        return DataLoader(self, batch_sampler=batches, collate_fn=self._collate)

    def _collate(self, rows: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - a BatchEncoding
        batch = self.tokenizer.pad([{"input_ids": row["ids"]} for row in rows], return_tensors="pt")
        for name in ("index", "evaluation"):
            batch[name] = [row[name] for row in rows]
        return batch


class Moments(RunningMoments):
    """trlx's moments of scores; keeps the scaled scores of an iteration."""

    def __init__(self, trainer: HandedPpo) -> None:
        super().__init__()
        self.trainer = trainer
        self.scaled: list[float] = []

    def update(self, xs: torch.Tensor) -> Any:  # noqa: ANN401 - trlx's own
        """Take in the scores [n] of a chunk."""
        moments = super().update(xs)
        divisors = {"running": self.std, "ref": self.trainer.ref_std}
        divisor = divisors.get(self.trainer.config.method.scale_reward, 1.0)
        self.scaled += (xs / divisor).tolist()
        return moments


@register_trainer
class HandedPpo(AcceleratePPOTrainer):
    """trlx's trainer between the line and the plan.

    Attributes:
        line: To the process that started this one.
        plan: The plan, as `rlhf_exp.trlx.plan` wrote it.
        prompts: Ids of the validation prompts.
    """

    line: WorkerChannel
    plan: dict[str, Any]
    prompts: list[list[int]]

    def __init__(self, config: TRLConfig, **kwargs: Any) -> None:  # noqa: ANN401 - trlx's own
        self.lr = self.grad_norm = 0.0
        self.last_eval, self.sampled, self.evaluating = -1, 0.0, 0.0
        self.drawn: list[list[int]] = []
        super().__init__(config, **kwargs)
        if config.model.num_layers_unfrozen < 0:
            self.ref_model = self.get_arch(config).to(self.accelerator.device).eval()
            del self.ref_model.frozen_head, self.model.frozen_head
        self.accelerator.log = self.report
        self.running_moments = Moments(self)

    def setup_optimizer(self) -> Any:  # noqa: ANN401 - torch's optimizer
        """Clip gradients before each of its steps."""
        optimizer = super().setup_optimizer()
        optimizer.register_step_pre_hook(self._clip)
        return optimizer

    def _clip(self, optimizer: Any, *_: Any) -> None:  # noqa: ANN401
        (group,) = optimizer.param_groups
        norm = torch.nn.utils.clip_grad_norm_(group["params"], self.plan["grad_norm"])
        self.lr, self.grad_norm = group["lr"], float(norm)

    def prepare_learning(self) -> None:
        """Say how much there is to train."""
        model = self.accelerator.unwrap_model(self.model)
        parts = [*model.base_model.parameters(), *model.v_head.parameters()]
        trained = sum(part.numel() for part in parts if part.requires_grad)
        total = sum(part.numel() for part in parts)
        self.line.send(kind="ready", parameters=total, trainable=trained)
        super().prepare_learning()

    def decode(self, prompts: Any, samples: Any, prompt_sizes: Any = None, **_: Any) -> Any:  # noqa: ANN401
        """Mark in evaluations, too, which answers have ended."""
        return super().decode(prompts, samples, prompt_sizes, append_eos_token=True)

    def make_experience(self, num_rollouts: int = 1024, iter_count: int = 0) -> None:
        """Say how long it took, and how far the policy is from the reference."""
        began = perf_counter()
        self.running_moments.scaled = []
        super().make_experience(num_rollouts, iter_count)
        self.sampled, self.evaluating = perf_counter(), 0.0
        seconds = self.sampled - began
        self.line.send(kind="experience", seconds=seconds, kl=self._rollout_kl())

    def _rollout_kl(self) -> list[float]:
        """Return the sum of log policy - log reference over each response, in nats.

        trlx keeps it as a part of the rewards, -beta times it, and the score in the last one, which
        lies behind the response unless that is the longest. Without a penalty it is not known.
        """
        beta = self.kl_ctl.value
        if beta == 0:
            return []
        divergences = []
        rows = zip(self.store.history, self.running_moments.scaled, strict=True)
        for element, score in rows:
            count = int((element.response_tensor != self.tokenizer.pad_token_id).sum())
            penalty = float(element.rewards[:count].double().sum())
            if len(element.rewards) == count:
                penalty -= score
            divergences.append(-penalty / beta)
        return divergences

    def report(self, stats: dict[str, Any], step: int | None = None, **_: Any) -> None:  # noqa: ANN401
        """Send the metrics that trlx would send to a tracker."""
        numbers = {name: float(value) for name, value in stats.items()}
        if "losses/total_loss" in numbers:
            numbers["time/update"] = perf_counter() - self.sampled - self.evaluating
            numbers |= {"lr": self.lr, "grad_norm": self.grad_norm, "peak": peak_bytes()}
        self.line.send(kind="log", step=step, stats=numbers)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate if that is due, then save and go on, or not, as told."""
        step, every = self.iter_count, self.plan["eval_every"]
        if step // every == self.last_eval // every and step < self.total_steps:
            return {}
        began, self.last_eval, self.drawn = perf_counter(), step, []
        super().evaluate()
        answer = self.line.ask(kind="evaluated", step=step, kl=self._validation_kl())
        if answer["save"]:
            self._save()
        if answer["stop"]:
            raise Stopped
        self.evaluating += perf_counter() - began
        return {}

    def generate_eval(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Keep the tokens that were drawn."""
        samples: torch.Tensor = super().generate_eval(input_ids, *args, **kwargs)
        self.drawn += [
            until_ended(
                row, [self.tokenizer.eos_token_id], self.tokenizer.decode, self.stop_sequences
            )
            for row in samples[:, input_ids.shape[1] :].tolist()
        ]
        return samples

    @torch.no_grad()
    def _validation_kl(self) -> list[float]:
        """Return the sum of log policy - log reference over each validation answer, as drawn."""
        divergences = []
        for prompt, answer in zip(self.prompts, self.drawn, strict=True):
            tokens = torch.tensor([prompt + answer], device=self.accelerator.device)
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            inputs = {"attention_mask": torch.ones_like(tokens), "position_ids": positions}
            whole = hasattr(self.model, "frozen_head")
            reference = self.model.forward_hydra if whole else self.ref_model
            policy, other = (
                logprobs_of_labels(
                    model(tokens, return_dict=True, **inputs).logits[:, :-1], tokens[:, 1:]
                )
                for model in (self.model, reference)
            )
            divergences.append(float((policy - other)[0, len(prompt) - 1 :].sum()))
        return divergences

    def _save(self) -> None:
        model = self.accelerator.unwrap_model(self.model).base_model
        save_weights(model.named_parameters(), Path(self.plan["weights"]))

    def save_pretrained(self, directory: str | None = None, **_: Any) -> None:  # noqa: ANN401
        """Save nothing: the weights asked for are saved after an evaluation."""
