"""Proximal policy optimisation against a reward, with a KL penalty to the initial policy.

An iteration samples `rollouts` responses (`experience.py`) and passes over them `epochs` times in
minibatches; each minibatch is one optimizer step of the shared loop. The run can stop and resume
between iterations.

Source: Schulman et al. 2017 (PPO), Ziegler et al. 2019 (KL-penalised rewards for language models).

n rows of a minibatch in this process, T response tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_exp.algo.losses import entropy_bonus, policy_loss, value_loss
from rlhf_exp.batch import Rollouts
from rlhf_exp.data.order import epoch_permutation
from rlhf_exp.distributed.trade import same_widths, trade
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.experience import Collector
from rlhf_exp.engines.native.meters import Meters
from rlhf_exp.engines.native.split import by_length
from rlhf_exp.engines.native.task import Evaluation
from rlhf_exp.models.policy import Policy, ResponseOutputs


@dataclass(frozen=True)
class PpoSettings:
    """Sizes and coefficients of the updates.

    Attributes:
        rollouts: Responses an iteration, over all processes.
        batch: Rollouts of an optimizer step, over all processes.
        micro_batch: Rows of one forward; `None`: a process's whole share.
        epochs: Passes over an iteration's rollouts.
        clip_range: Clip range of the probability ratio.
        clip_range_value: Clip range of the value function.
        vf_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        temperature: Of all log-probabilities.
        kl_stop: Stop above this sequence KL in nats; `None`: never.
        seed: Of the order of rollouts within an epoch.
    """

    rollouts: int
    batch: int
    micro_batch: int | None
    epochs: int
    clip_range: float
    clip_range_value: float
    vf_coef: float
    entropy_coef: float
    temperature: float
    kl_stop: float | None
    seed: int

    @property
    def minibatches(self) -> int:
        """Optimizer steps of one epoch; the last may be smaller."""
        return -(-self.rollouts // self.batch)

    @property
    def updates(self) -> int:
        """Optimizer steps of one iteration."""
        return self.minibatches * self.epochs


class Evaluator(Protocol):
    """Evaluates the policy; what the first evaluation has found is kept, see `Validator`."""

    unit: float | None
    initial: list[float] | None

    def __call__(self) -> Evaluation:
        """Evaluate the policy as it is."""


class PpoTask:
    """What PPO brings to the loop.

    Args:
        policy: The policy, with its value head.
        collector: Makes each iteration's experience.
        evaluator: Answers validation prompts and scores the answers.
        settings: Sizes and coefficients.
        world: The processes.
    """

    def __init__(
        self,
        policy: Policy,
        collector: Collector,
        evaluator: Evaluator,
        settings: PpoSettings,
        world: World,
    ) -> None:
        self.module: nn.Module = policy
        self.collector, self.evaluator = collector, evaluator
        self.settings, self.world = settings, world
        self.meters = Meters(world)
        self.rollouts: Rollouts | None = None
        self._forward: Callable[..., Any] = policy
        self._began = self._updating = 0.0

    def attach(self, wrapped: nn.Module) -> None:
        """Send forward passes with gradients through the strategy's wrapper."""
        self._forward = wrapped

    def accumulate(self, step: int, backward: Callable[[Tensor], None]) -> None:
        """Compute the loss of one minibatch, collecting experience first where a new one begins."""
        iteration, update = divmod(step, self.settings.updates)
        if update == 0:
            self._began = time.perf_counter()
            with self.world.gathered():
                rollouts = self.collector.collect(iteration, self.meters)
            self.rollouts = same_widths(rollouts, self.world)
            self._updating = time.perf_counter()
        assert self.rollouts is not None, "a run resumes at the beginning of an iteration"
        chosen = self._minibatch(iteration, update)
        minibatch = trade(self.rollouts, chosen, self.world)
        real = torch.from_numpy(self.world.share(len(chosen)).weights) > 0
        mask = minibatch.mask & real[:, None].to(self.world.device)
        minibatch = replace(minibatch, mask=mask)
        normaliser = self.world.sum(mask.sum().double()).float()
        lengths = (minibatch.prompt_lengths + minibatch.response_lengths).cpu()
        parts = by_length(lengths, self.settings.micro_batch)
        for part in self.world.micro_batches(parts):
            longest = int(lengths[part].max())
            backward(self._loss(minibatch.select(part), longest, normaliser, update == 0))

    def _minibatch(self, iteration: int, update: int) -> np.ndarray:
        """Return the numbers of a minibatch's rows among all processes' rollouts."""
        settings = self.settings
        epoch, number = divmod(update, settings.minibatches)
        order = epoch_permutation(
            settings.rollouts, settings.seed, iteration * settings.epochs + epoch
        )
        return order[number * settings.batch : (number + 1) * settings.batch]

    def _loss(self, batch: Rollouts, longest: int, normaliser: Tensor, first: bool) -> Tensor:
        """Return this micro-batch's part of the minibatch's loss (0-dim)."""
        settings = self.settings
        width = int(batch.response_lengths.max())
        mask = batch.mask[:, :width]
        states = None if batch.states is None else batch.states[:, :longest]
        with self.world.autocast():
            outputs: ResponseOutputs = self._forward(
                tokens=batch.tokens[:, :longest],
                prompt_lengths=batch.prompt_lengths,
                response_lengths=batch.response_lengths,
                temperature=settings.temperature,
                states=None if states is None else states.to(self.world.device),
                with_entropy=settings.entropy_coef > 0.0,
                width=width,
            )
        policy, policy_stats = policy_loss(
            outputs.logprobs,
            batch.logprobs[:, :width],
            batch.advantages[:, :width],
            mask,
            settings.clip_range,
            normaliser,
        )
        value, value_stats = value_loss(
            outputs.values,
            batch.values[:, :width],
            batch.returns[:, :width],
            mask,
            settings.clip_range_value,
            normaliser,
        )
        loss = policy + settings.vf_coef * value
        if outputs.entropy is not None:
            loss = loss - settings.entropy_coef * entropy_bonus(outputs.entropy, mask, normaliser)
        count = policy_stats.count
        share = count / normaliser
        self.meters.add("loss/total", loss, share)
        self.meters.add("loss/policy", policy, share)
        self.meters.add("loss/value", value, share)
        self.meters.add("policy/clip_fraction", policy_stats.clipped, count)
        self.meters.add("policy/approx_kl", policy_stats.approx_kl, count)
        self.meters.extreme("policy/ratio_max", policy_stats.ratio_max, largest=True)
        self.meters.add("value/clip_fraction", value_stats.clipped, count)
        if first:
            # Away from 1 here, sampling and training would not see the same policy.
            self.meters.extreme("policy/ratio_first", policy_stats.ratio_max, largest=True)
        return loss

    def at_boundary(self, step: int) -> bool:
        """Between iterations: the rollouts of the next one depend on nothing but the weights."""
        return step % self.settings.updates == 0

    def metrics(self) -> dict[str, float]:
        """Return the iteration's means, and let the KL controller react to them."""
        now = time.perf_counter()
        count = self.settings.rollouts
        self.meters.add("time/update_s", now - self._updating, 1.0)
        found = self.meters.means()
        elapsed = now - self._began
        found["throughput/samples_per_s"] = count / elapsed
        found["throughput/tokens_per_s"] = count * found["response/length_mean"] / elapsed
        self.collector.controller.update(found["kl/sequence"], count)
        self.rollouts = None
        return found

    def distributions(self) -> dict[str, list[float]]:
        """Return the iteration's raw scores and its KL by response."""
        return self.meters.distributions()

    def evaluate(self) -> Evaluation:
        """Answer validation prompts and score the answers."""
        with self.world.gathered():
            return self.evaluator()

    def state(self) -> dict[str, Any]:
        """Return the KL coefficient, the moments of the scores, and the first evaluation's."""
        return {
            "controller": self.collector.controller.state_dict(),
            "scaler": self.collector.scaler.state_dict(),
            "unit": self.evaluator.unit,
            "initial": self.evaluator.initial,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.evaluator.unit, self.evaluator.initial = state["unit"], state["initial"]
        self.collector.controller.load_state_dict(state["controller"])
        self.collector.scaler.load_state_dict(state["scaler"])

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Return why training must stop, or `None`."""
        for name in ("loss/total", "kl/sequence", "reward/mean"):
            if not math.isfinite(metrics[name]):
                return f"{name} is {metrics[name]}"
        limit = self.settings.kl_stop
        if limit is not None and metrics["kl/sequence"] > limit:
            return f"kl/sequence is {metrics['kl/sequence']:.3g}, above ppo.kl.stop={limit:g}"
        return None
