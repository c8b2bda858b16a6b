"""Our PPO with one thing done as trlx does it: what each deliberate difference is worth.

    python benchmarks/parity_ablations.py whitening experiment=demo stage=ppo eval=none

It is `launch.py` with one replacement, named first. The replaced code is no part of a result's key:
give such runs an `output_dir` of their own, as `benchmarks/parity.py` does.
docs/how-to/trlx.md lists the differences; the names here are those of `ABLATIONS`.

B rows, S tokens of a row, T response tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_exp.algo import advantages as advantages_module
from rlhf_exp.batch import FinishReason, Rollouts, Samples
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.data.batching import right_padded
from rlhf_exp.hydra_app import main
from rlhf_exp.models import policy as policy_module
from rlhf_exp.processes.failures import exit_after
from rlhf_exp.training import ppo as ppo_module
from rlhf_exp.training import trainer as trainer_module

SCORE_PART = 32
"""Responses after which the scale of scores changes, where it does so within an iteration."""


def whitening() -> None:
    """Whiten advantages over each minibatch, padding included, instead of over the iteration."""
    collector, task = ppo_module.ExperienceCollector, ppo_module.PpoTask
    losses = task._losses

    def of_minibatch(
        self: ppo_module.PpoTask, minibatch: Rollouts, count: int, first: bool
    ) -> Iterator[Tensor]:
        every = torch.ones_like(minibatch.mask)
        whitened = advantages_module.whiten(minibatch.advantages, every)
        return losses(self, replace(minibatch, advantages=whitened), count, first)

    replace_in(collector, "_whiten", lambda self, values, mask: values)
    replace_in(task, "_losses", of_minibatch)


def value_head() -> None:
    """Read values by two layers, twice as wide as the model inside, instead of a linear one."""

    class TwoLayers(nn.Module):
        def __init__(self, width: int, seed: int = 0) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1)
            )

        def forward(self, hidden: Tensor) -> Tensor:
            values: Tensor = self.layers(hidden.float()).squeeze(-1)
            return values

    replace_in(policy_module, "ValueHead", TwoLayers)
    # The policy alone is published: the head's form is not that of the store.
    save = policy_module.save_policy
    replace_in(
        policy_module,
        "save_policy",
        lambda model, head, *others: save(model, None, *others),
    )


def score_parts() -> None:
    """Divide scores by the deviation so far after each part, instead of after the iteration."""
    scaler = advantages_module.RewardScaler
    scale = scaler.scale

    def by_parts(
        self: advantages_module.RewardScaler,
        scores: Tensor,
        all_scores: Tensor | None = None,
        largest: float = 0.0,
    ) -> Tensor:
        parts = scores.split(SCORE_PART)
        return torch.cat([scale(self, part, part, largest) for part in parts])

    replace_in(scaler, "scale", by_parts)


def kl_controller() -> None:
    """Steer the weight of the penalty once an epoch, as if one minibatch had been sampled."""
    task = ppo_module.PpoTask
    finish = task._finish

    def often(self: ppo_module.PpoTask, seconds: float) -> dict[str, float]:
        controller, section = self.collector.controller, self.section
        update = controller.update

        def each_epoch(kl: float, _rollouts: int) -> None:
            for _ in range(section.epochs):
                update(kl, section.batch)

        controller.update = each_epoch  # type: ignore[method-assign]
        try:
            return finish(self, seconds)
        finally:
            del controller.update

    replace_in(task, "_finish", often)


def weight_decay() -> None:
    """Decay every parameter, instead of matrices alone."""
    build = trainer_module.build_optimizer

    def decay_all(module: nn.Module, section: TrainingConfig) -> torch.optim.AdamW:
        optimizer = build(module, section)
        for group in optimizer.param_groups:
            group["weight_decay"] = section.weight_decay
        return optimizer

    replace_in(trainer_module, "build_optimizer", decay_all)


def encoded_again() -> None:
    """Train on the response's text, encoded again, instead of on the tokens sampled."""

    def rewritten(samples: Samples, codec: Any) -> Samples:  # noqa: ANN401
        rows, lengths = [], []
        starts = samples.prompt_lengths.tolist()
        for row, start, content, finish in zip(
            samples.tokens.tolist(),
            starts,
            samples.content_lengths.tolist(),
            samples.finish.tolist(),
            strict=True,
        ):
            answer = codec.encode_response(codec.decode(row[start : start + content]))
            ending = [] if finish == FinishReason.LENGTH else [codec.eos_id]
            answer = answer + ending or [codec.eos_id]
            rows.append((torch.tensor(row[:start]).numpy(), torch.tensor(answer).numpy()))
            lengths.append((len(answer), len(answer) - len(ending)))
        tokens, _ = right_padded(rows)
        both = torch.tensor(lengths)
        return replace(
            samples,
            tokens=tokens,
            response_lengths=both[:, 0],
            content_lengths=both[:, 1],
            states=None,
            closing=None,
        )

    collector = ppo_module.ExperienceCollector
    sample = collector._sample

    def sample_and_rewrite(
        self: ppo_module.ExperienceCollector, iteration: int
    ) -> tuple[Samples, Tensor]:
        samples, weights = sample(self, iteration)
        return rewritten(samples, self.scorer.codec), weights  # type: ignore[attr-defined]

    replace_in(collector, "_sample", sample_and_rewrite)


def end_token() -> None:
    """Leave the end token out of training, as where it is the padding token too."""
    collector = ppo_module.ExperienceCollector
    score = collector._score

    def score_and_shorten(
        self: ppo_module.ExperienceCollector, samples: Samples, *others: object
    ) -> Tensor:
        scores = score(self, samples, *others)  # type: ignore[arg-type]
        ended = (samples.finish == FinishReason.EOS) & (samples.response_lengths > 1)
        samples.response_lengths.sub_(ended.long())
        return scores

    replace_in(collector, "_score", score_and_shorten)


ABLATIONS: dict[str, Callable[[], None]] = {
    one.__name__: one
    for one in (
        whitening,
        value_head,
        score_parts,
        kl_controller,
        weight_decay,
        encoded_again,
        end_token,
    )
}


def replace_in(owner: object, name: str, value: object) -> None:
    """Put `value` in the place of an attribute that must be there."""
    if not hasattr(owner, name):
        raise SystemExit(f"{owner} has no {name}: the ablation is out of date")
    setattr(owner, name, value)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ABLATIONS:
        raise SystemExit(f"the first argument is one of {', '.join(ABLATIONS)}")
    ABLATIONS[sys.argv[1]]()
    exit_after(lambda: main(sys.argv[2:]))
