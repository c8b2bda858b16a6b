"""The best-of-n stage: demonstrations for rejection fine-tuning.

The SFT policy answers each training and validation prompt n times, and the reward picks the best;
another SFT imitates these (`data.demonstrations=best_of:RUN`; RAFT, Dong et al. 2023; the rejection
sampling of Llama 2, Touvron et al. 2023). Test prompts are never asked. Answers that were cut at
their greatest length are not chosen: imitated, they would teach to stop in the middle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rlhf_exp.batch import FinishReason
from rlhf_exp.config.experiment import CHOSEN_FILE, Config
from rlhf_exp.data.batching import prompts_batch
from rlhf_exp.data.chosen_answers import write_chosen
from rlhf_exp.data.rows import Demonstration, Prompt
from rlhf_exp.data.tokenized import TokenizedPrompts, tokenize_prompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.models.policy import Policy
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.sampling import rollout_engine, rollout_request
from rlhf_exp.stages.scorers import EvaluationScorers
from rlhf_exp.stages.setup import load_policy_model, world_for
from rlhf_exp.stages.tracking import stage_progress, tracker_for
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.tracking.tracker import finishing
from rlhf_exp.training.reward_scorer import Scorer, score_samples, texts_of

PARTS = "parts"
"""Folder of the parts that are done, from which an interrupted stage goes on."""
_PROMPTS_OF_PART = 256


@dataclass(frozen=True)
class _Choice:
    """The answers to one prompt: the best one's text and score, and the mean score of all.

    `text` is `None` if every answer was cut or empty.
    """

    text: str | None
    score: float
    mean: float


def run(config: Config, context: StageContext) -> StageResult:
    """Sample, score and choose; leave the demonstrations in `context.folder`."""
    rows = _prompts(config, context)
    with world_for(config) as world:
        codec = context.materials.codec(context.models["sft"])
        policy = Policy(load_policy_model(config, context.models["sft"]), value_head=False)
        policy.requires_grad_(False).to(world.device)
        world.round_frozen(policy)
        request = rollout_request(config, codec, config.best_of.seed)
        ppo = config.ppo
        limits = (ppo.seq_length, ppo.generation.max_new_tokens)
        prompts = tokenize_prompts(rows, codec, *limits, context.cache / "tokenized")
        scorers = EvaluationScorers(config, context, world)
        scorers.rows(codec).add(prompts.prompt, rows)
        with closing(rollout_engine(config, context, policy, codec, world)) as engine:
            engine.refresh(0)
            sampler, scorer = partial(engine.answer, request=request), scorers.reward(codec)
            chooser = _Chooser(config.best_of.n, prompts, sampler, scorer, codec, world)
            choices = _choices(chooser, len(rows), context)
        return _conclude(config, context, world, rows, choices)


def _prompts(config: Config, context: StageContext) -> list[Prompt]:
    """Return the training prompts, `best_of.prompts` at most, and those of validation."""
    splits = context.materials.training_prompts(with_response=False)
    train = splits.train[: config.best_of.prompts]
    # Where there are none to validate on, the training prompts stand in for them.
    return train if splits.validation is splits.train else [*train, *splits.validation]


class _Chooser:
    """Answers prompts n times and chooses; all processes take part."""

    def __init__(
        self,
        n: int,
        prompts: TokenizedPrompts,
        sampler: Sampler,
        scorer: Scorer,
        codec: Codec,
        world: World,
    ) -> None:
        self.n, self.prompts, self.sampler = n, prompts, sampler
        self.scorer, self.codec, self.world = scorer, codec, world

    @torch.no_grad()
    def choose(self, rows: range) -> list[_Choice]:
        """Return the choice for each of these prompts; the same in every process."""
        index = np.repeat(np.asarray(rows), self.n)
        # An answer's noise goes by its number among all, whatever the parts and processes are.
        numbers = rows.start * self.n + np.arange(len(index))
        share = self.world.share(len(index))
        own = prompts_batch(self.prompts, index[share.rows], numbers[share.rows])
        samples = self.sampler(own.to(self.world.device))
        scores = score_samples(self.scorer, samples).tolist()
        parts = samples.tokens, samples.prompt_lengths, samples.content_lengths
        _, texts = texts_of(*parts, self.codec)
        whole = (samples.finish != FinishReason.LENGTH).tolist()
        gathered = self.world.all_gather_object(list(zip(texts, scores, whole, strict=True)))
        answers = [answer for share_of_one in gathered for answer in share_of_one][: len(index)]
        return [_best(answers[n : n + self.n]) for n in range(0, len(answers), self.n)]


def _best(answers: Sequence[tuple[str, float, bool]]) -> _Choice:
    """Return the choice among a prompt's answers: (text, score, whether it came to its end)."""
    mean = float(np.mean([score for _, score, _ in answers]))
    candidates = [(score, text) for text, score, whole in answers if whole and text]
    if not candidates:
        return _Choice(None, mean, mean)
    score, text = max(candidates, key=lambda candidate: candidate[0])
    return _Choice(text, score, mean)


def _choices(chooser: _Chooser, count: int, context: StageContext) -> list[_Choice]:
    """Return the choice for each prompt, part by part; parts that are done are read again."""
    choices: list[_Choice] = []
    with stage_progress(context, "best_of", count, chooser.world) as progress:
        for start in range(0, count, _PROMPTS_OF_PART):
            rows = range(start, min(start + _PROMPTS_OF_PART, count))
            path = context.folder / PARTS / f"{start:08d}.json"
            choices += _done(path, chooser.world) or _make(path, chooser, rows, context)
            progress.update(len(choices), {})
    return choices


def _done(path: Path, world: World) -> list[_Choice]:
    """Return the choices of a part that an earlier run has left; nothing without one."""
    read = json.loads(path.read_text()) if world.is_main and path.is_file() else []
    return [_Choice(**choice) for choice in world.broadcast_object(read)]


def _make(path: Path, chooser: _Chooser, rows: range, context: StageContext) -> list[_Choice]:
    choices = chooser.choose(rows)
    if chooser.world.is_main:
        context.before_write()
        path.parent.mkdir(exist_ok=True)
        write_json_atomic(path, [vars(choice) for choice in choices])
    return choices


def _conclude(
    config: Config,
    context: StageContext,
    world: World,
    rows: list[Prompt],
    choices: list[_Choice],
) -> StageResult:
    """Write the demonstrations and record the numbers."""
    chosen = [
        (Demonstration(row.history, choice.text, row.origin), choice.score)
        for row, choice in zip(rows, choices, strict=True)
        if choice.text is not None
    ]
    if not chosen:
        raise UserError(
            f"best_of: all {config.best_of.n} answers to each of {len(rows)} prompts were cut at "
            f"ppo.generation.max_new_tokens={config.ppo.generation.max_new_tokens} or are empty, "
            "so none is a demonstration; raise it, or train SFT longer"
        )
    metrics = {
        "best_of/reward_chosen": float(np.mean([score for _, score in chosen])),
        "best_of/reward_mean": float(np.mean([choice.mean for choice in choices])),
        "best_of/chosen_fraction": len(chosen) / len(rows),
    }

    def save() -> str:
        context.before_write()
        write_chosen(context.folder / CHOSEN_FILE, *zip(*chosen, strict=True))
        with finishing(tracker_for(config, context, None, world)) as tracker:
            tracker.log(metrics, 0)
            tracker.summary(metrics)
            return tracker.run_id

    run_id = world.run_on_all(lambda: save() if world.is_main else None)[0]
    facts: dict[str, float | int | str] = {"prompts": len(rows), "demonstrations": len(chosen)}
    return StageResult(metrics, None, run_id, facts)
