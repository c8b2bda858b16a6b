"""The eval stage: SFT against PPO on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.kl import sequence_kl
from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.config.data import Source
from rlhf_exp.config.root import Config
from rlhf_exp.data.codec import Codec
from rlhf_exp.data.collate import prompts_batch
from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.scoring import Scorer, score_samples, texts_of
from rlhf_exp.engines.native.split import by_length
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.quick import quick_comparison
from rlhf_exp.evaluation.result import QuickResult
from rlhf_exp.evaluation.toxicity import ProfanityCheckScorer
from rlhf_exp.models.policy import Policy
from rlhf_exp.rollout.sampler import Sampling, sample
from rlhf_exp.rollout.stops import Stopper
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.scorers import scorer_for
from rlhf_exp.stages.training import load_policy_model, tracker_for, world_for
from rlhf_exp.tracking.finishing import finishing

RESULT = "result.json"


@dataclass(frozen=True)
class _Answers:
    """One model's answers: texts of prompts and answers, scores [N], tokens of the answers [N]."""

    prompts: list[str]
    answers: list[str]
    scores: np.ndarray
    lengths: np.ndarray


def run(config: Config, context: StageContext) -> StageResult:
    """Answer held-out prompts by both models, compare, and leave `result.json`."""
    with world_for(config) as world:
        codec = _common_codec(context)
        prompts = _prompts(config, context, codec)
        share = world.share(len(prompts))
        mine = prompts.select(torch.from_numpy(share.rows)).to(world.device)
        policies = {role: _load(config, context, role, world) for role in ("sft", "ppo")}
        scorer = scorer_for(config, context, codec, world)
        samples = {role: _sample(config, policies[role], mine, codec) for role in policies}
        found = {
            role: _everyone(_answers(one, codec, scorer), len(prompts), world)
            for role, one in samples.items()
        }
        kl = world.gather(_kl(policies["ppo"], policies["sft"], samples["ppo"], config))
        kl = kl.cpu()[: len(prompts)]

        def conclude() -> tuple[dict[str, float], str] | None:
            if not world.is_main:
                return None
            result = _compare(config, found["sft"], found["ppo"], kl)
            (context.folder / RESULT).write_text(json.dumps(result.to_json()))
            metrics = result.scalars()
            return metrics, _track(config, context, result, metrics, world)

        concluded = world.together(conclude)[0]
        assert concluded is not None
        return StageResult(concluded[0], None, concluded[1], {"prompts": len(prompts)})


def _common_codec(context: StageContext) -> Codec:
    """Return the codec of both models.

    Raises:
        UserError: Their tokenizers differ, so there is no KL between them.
    """
    sft, ppo = (context.materials.codec(context.models[role]) for role in ("sft", "ppo"))
    if sft.digest != ppo.digest:
        raise UserError(
            f"{context.models['sft']} and {context.models['ppo']} have different tokenizers; "
            "compare a policy with the SFT model it was trained from (sft.use, ppo.use)"
        )
    return sft


def _prompts(config: Config, context: StageContext, codec: Codec) -> Prompts:
    rows = context.materials.corpus.prompts.test[: config.eval.prompts]
    if not rows:
        raise UserError("data: no test prompts to evaluate on; give data.test or a test_fraction")
    longest = config.eval.max_new_tokens or config.ppo.generation.max_new_tokens
    tokenized = tokenize_prompts(
        rows, codec, config.ppo.seq_length, longest, context.cache / "tokenized"
    )
    everything = np.arange(len(rows))
    return prompts_batch(tokenized, everything, everything)


def _load(config: Config, context: StageContext, role: str, world: World) -> Policy:
    model = load_policy_model(config, context.models[role])
    policy = Policy(model, value_head=False).requires_grad_(False)
    return policy.to(world.device)


def _sample(config: Config, policy: Policy, prompts: Prompts, codec: Codec) -> Samples:
    section = config.eval
    greedy = section.temperature == 0.0
    settings = Sampling(
        max_new_tokens=section.max_new_tokens or config.ppo.generation.max_new_tokens,
        temperature=1.0 if greedy else section.temperature,
        batch=section.batch,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
        greedy=greedy,
    )
    stopper = Stopper(codec.tokenizer, codec.stop_strings)
    return sample(policy.model, prompts, settings, section.seed, stopper)


def _answers(samples: Samples, codec: Codec, scorer: Scorer) -> _Answers:
    texts = texts_of(samples.tokens, samples.prompt_lengths, samples.content_lengths, codec)
    scores = score_samples(scorer, samples).numpy()
    return _Answers(*texts, scores, samples.response_lengths.cpu().numpy())


def _everyone(mine: _Answers, count: int, world: World) -> _Answers:
    """Return the answers of all processes to `count` prompts, in the prompts' order."""
    parts = world.collect(mine)
    return _Answers(
        prompts=[text for part in parts for text in part.prompts][:count],
        answers=[text for part in parts for text in part.answers][:count],
        scores=np.concatenate([part.scores for part in parts])[:count],
        lengths=np.concatenate([part.lengths for part in parts])[:count],
    )


@torch.no_grad()
def _kl(policy: Policy, reference: Policy, samples: Samples, config: Config) -> Tensor:
    """Return the sum over each answer [N] of log policy - log reference, in nats."""
    temperature = config.eval.temperature or 1.0
    kl = torch.zeros(len(samples))
    lengths = (samples.prompt_lengths + samples.response_lengths).cpu()
    for part in by_length(lengths, config.eval.batch):
        rows = samples.select(part)
        rows = replace(rows, tokens=rows.tokens[:, : int(lengths[part].max())])
        arguments = (rows.tokens, rows.prompt_lengths, rows.response_lengths, temperature)
        ours = policy.response_outputs(*arguments).logprobs
        theirs = reference.response_outputs(*arguments).logprobs
        mask = response_mask(rows.response_lengths, ours.shape[1])
        kl[part] = sequence_kl(ours, theirs, mask).cpu()
    return kl


def _compare(config: Config, sft: _Answers, ppo: _Answers, kl: Tensor) -> QuickResult:
    return quick_comparison(
        sft.prompts,
        sft.answers,
        ppo.answers,
        sft.scores,
        ppo.scores,
        kl.numpy(),
        lengths_a=sft.lengths,
        lengths_b=ppo.lengths,
        toxicity=ProfanityCheckScorer(),
        gold=_gold(config),
        judge="reward function" if config.ppo.reward.function else "reward model",
        seed=config.eval.seed,
        tie_band=(config.eval.tie_low, config.eval.tie_high),
    )


def _gold(config: Config) -> Callable[[str, str], float] | None:
    """Return the toy data's rule-based judge; other data has none."""
    if config.data.source != Source.toy:
        return None
    from rlhf_exp.data.toy.judge import gold_score

    return lambda prompt, answer: gold_score(prompt, answer).total


def _track(
    config: Config,
    context: StageContext,
    result: QuickResult,
    metrics: dict[str, float],
    world: World,
) -> str:
    """Record the numbers and the table of answers; return the run's id."""
    with finishing(tracker_for(config, context, None, world)) as tracker:
        tracker.log(metrics, 0)
        columns = ["prompt", "sft", "ppo", "sft score", "ppo score", "outcome"]
        table = [
            [row.prompt, row.answer_a, row.answer_b, row.score_a, row.score_b, row.outcome]
            for row in result.rows
        ]
        tracker.table("eval/side_by_side", columns, table, 0)
        tracker.summary(metrics)
        return tracker.run_id
