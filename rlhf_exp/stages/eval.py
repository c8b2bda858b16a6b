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
from rlhf_exp.batch import Samples
from rlhf_exp.config.data import Source
from rlhf_exp.config.root import Config
from rlhf_exp.data.codec import Codec
from rlhf_exp.data.collate import prompts_batch
from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.scoring import score_samples, texts_of
from rlhf_exp.engines.native.split import by_length
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.quick import quick_comparison
from rlhf_exp.evaluation.toxicity import ProfanityCheckScorer
from rlhf_exp.models.load import load_causal_lm
from rlhf_exp.models.policy import Policy
from rlhf_exp.rollout.sampler import Sampling, sample
from rlhf_exp.rollout.stops import Stopper
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.scorers import scorer_for
from rlhf_exp.stages.training import tracker_for, world_for
from rlhf_exp.tracking.finishing import finishing

RESULT = "result.json"


@dataclass(frozen=True)
class _Answers:
    """One model's answers: samples, texts of prompts and answers, scores [N]."""

    samples: Samples
    prompts: list[str]
    answers: list[str]
    scores: np.ndarray


def run(config: Config, context: StageContext) -> StageResult:
    """Answer held-out prompts by both models, compare, and leave `result.json`."""
    rows = context.materials.corpus.prompts.test[: config.eval.prompts]
    if not rows:
        raise UserError("data: no test prompts to evaluate on; give data.test or a test_fraction")
    with world_for(config) as world:
        codec = context.materials.codec(context.models["sft"])
        prompts = tokenize_prompts(
            rows,
            codec,
            config.ppo.seq_length,
            config.eval.max_new_tokens or config.ppo.generation.max_new_tokens,
            context.cache / "tokenized",
        )
        everything = np.arange(len(rows))
        batch = prompts_batch(prompts, everything, everything).to(world.device)
        policies = {role: _load(config, context, role, world) for role in ("sft", "ppo")}
        scorer = scorer_for(config, context, codec, world)
        found = {}
        for role, policy in policies.items():
            samples = sample(
                policy.model,
                batch,
                _sampling(config, codec),
                config.eval.seed,
                Stopper(codec.tokenizer, codec.stop_strings),
            )
            texts = texts_of(
                samples.tokens, samples.prompt_lengths, samples.content_lengths, codec
            )
            scores = score_samples(scorer, samples).numpy()
            found[role] = _Answers(samples, *texts, scores)
        kl = _kl(policies["ppo"], policies["sft"], found["ppo"].samples, config)
    sft, ppo = found["sft"], found["ppo"]
    result = quick_comparison(
        sft.prompts,
        sft.answers,
        ppo.answers,
        sft.scores,
        ppo.scores,
        kl.numpy(),
        lengths_a=sft.samples.response_lengths.cpu().numpy(),
        lengths_b=ppo.samples.response_lengths.cpu().numpy(),
        toxicity=ProfanityCheckScorer(),
        gold=_gold(config),
        judge="reward function" if config.ppo.reward.function else "reward model",
        seed=config.eval.seed,
        tie_band=(config.eval.tie_low, config.eval.tie_high),
    )
    (context.folder / RESULT).write_text(json.dumps(result.to_json()))
    metrics = result.scalars()
    with finishing(tracker_for(config, context, None)) as tracker:
        tracker.log(metrics, 0)
        columns = ["prompt", "sft", "ppo", "sft score", "ppo score", "outcome"]
        table = [
            [row.prompt, row.answer_a, row.answer_b, row.score_a, row.score_b, row.outcome]
            for row in result.rows
        ]
        tracker.table("eval/side_by_side", columns, table, 0)
        tracker.summary(metrics)
        run_id = tracker.run_id
    objective = metrics["eval/reward/b"] - config.ppo.kl.coef * metrics["eval/kl_sequence/b"]
    return StageResult(metrics, objective, run_id, {"prompts": len(rows)})


def _load(config: Config, context: StageContext, role: str, world: World) -> Policy:
    dtype = getattr(torch, config.model.dtype.value)
    model = load_causal_lm(context.models[role], None, dtype, config.model.attention.value)
    policy = Policy(model, value_head=False).requires_grad_(False)
    return policy.to(world.device)


def _sampling(config: Config, codec: Codec) -> Sampling:
    section = config.eval
    greedy = section.temperature == 0.0
    return Sampling(
        max_new_tokens=section.max_new_tokens or config.ppo.generation.max_new_tokens,
        temperature=1.0 if greedy else section.temperature,
        batch=section.batch,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
        greedy=greedy,
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


def _gold(config: Config) -> Callable[[str, str], float] | None:
    """Return the toy data's rule-based judge; other data has none."""
    if config.data.source != Source.toy:
        return None
    from rlhf_exp.data.toy.judge import gold_score

    return lambda prompt, answer: gold_score(prompt, answer).total
