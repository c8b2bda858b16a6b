"""The DPO stage: the SFT policy learns from preferences directly, without a reward model.

The reference's log-probabilities are computed once for all runs that share pairs and SFT model, and
kept by content. The reference itself stays in memory only if answers are sampled for the KL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.config.experiment import Config, StrategyName
from rlhf_exp.config.training import DpoConfig
from rlhf_exp.data.batching import batch_index
from rlhf_exp.data.tokenized import TokenizedPreferences
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import Reference, build_reference
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.dpo_inputs import dpo_pairs, dpo_prompts
from rlhf_exp.stages.kept_tensor import kept_tensor
from rlhf_exp.stages.publish import save_models
from rlhf_exp.stages.sampling import rollout_engine, rollout_request
from rlhf_exp.stages.setup import load_policy_model, world_for
from rlhf_exp.stages.training import (
    keep_small_updates,
    lora_of,
    parameter_facts,
    run_loop,
    steps_of,
)
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.training.dpo import DpoTask, pair_logprobs, pair_micro_batches
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.validation_answers import sample_answers

WATCH = ("loss/total", "dpo/accuracy", "eval/kl_sequence")
FOLDER = "reference_logprobs"


def run(config: Config, context: StageContext) -> StageResult:
    """Train, and leave the policy in `context.folder/model`."""
    section = config.dpo
    with world_for(config) as world, ExitStack() as stack:
        codec = context.materials.codec(context.models["sft"])
        pairs, validation = dpo_pairs(config, context, codec)
        steps = steps_of(section.steps, section.epochs, len(pairs), section.batch)
        # A reference that runs on the policy's own weights needs them before they are divided.
        whole = section.train_blocks is not None or section.lora.rank > 0
        policy = build_policy(config, context, whole or world.has_weights)
        if whole or not world.setup.divides_weights:
            policy.to(world.device)
        keep_small_updates(policy)
        # After it: mixed precision computes otherwise with weights in float32 than in bfloat16.
        reference = build_reference(policy, world.weights_dtype, world.place)
        met = _met(len(pairs), steps, section)
        task = DpoTask(
            policy,
            pairs,
            _ref_logprobs(reference, pairs, met, config, context, world),
            validation,
            _ref_logprobs(
                reference, validation, np.arange(len(validation)), config, context, world
            ),
            _sampled(config, context, policy, reference, codec, world, stack),
            section,
            world,
        )
        del reference
        conclude = partial(save_models, config, context, world, policy, codec.tokenizer)
        outcome = run_loop(config, section, steps, task, world, context, WATCH, conclude)
        facts = parameter_facts(policy) | {"pairs": len(pairs), "cut_prompts": pairs.cut}
        return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)


def build_policy(config: Config, context: StageContext, weights: bool) -> Policy:
    """Return the SFT model, set up for training; perhaps without `weights`."""
    section = config.dpo
    return Policy(
        load_policy_model(config, context.models["sft"], weights=weights),
        train_blocks=section.train_blocks,
        lora=lora_of(section),
        value_head=False,
        seed=section.seed,
        # They hook into each block, and must see it called once and whole.
        run_all_positions=config.distributed.strategy in (StrategyName.zero3, StrategyName.fsdp),
    ).set_gradient_checkpointing(section.gradient_checkpointing)


def _met(count: int, steps: int, section: DpoConfig) -> np.ndarray:
    """Return the pairs that the run meets, each once, in ascending order."""
    found = np.zeros(count, dtype=bool)
    for step in range(steps):
        found[batch_index(count, section.batch, section.seed, step)] = True
        if found.all():
            break
    return found.nonzero()[0]


@torch.no_grad()
def _ref_logprobs(
    reference: Reference,
    pairs: TokenizedPreferences,
    rows: np.ndarray,
    config: Config,
    context: StageContext,
    world: World,
) -> Tensor:
    """Return the reference's log-probabilities [pairs, 2] float32 of both responses; NaN elsewhere.

    Args:
        reference: The frozen model.
        pairs: The pairs.
        rows: [n] int64, those that are needed.
        config: The experiment.
        context: Names the cache, and the weights.
        world: The processes.
    """
    section = config.dpo
    size = section.micro_batch or section.batch

    def compute() -> Tensor:
        own = rows[world.share(len(rows)).rows]
        found = torch.zeros(len(own), 2)
        for part in pair_micro_batches(pairs, rows, section, size, world):
            index = own[part.numpy()]
            with world.autocast():
                found[part] = pair_logprobs(reference, pairs, index, section, world.device).cpu()
        result = torch.full((len(pairs), 2), float("nan"))
        result[torch.from_numpy(rows)] = world.gather(found).cpu()[: len(rows)]
        return result

    digest = hashlib.sha256(rows.tobytes())
    for column in (pairs.prompt, pairs.chosen, pairs.rejected):
        digest.update(np.ascontiguousarray(column.flat).tobytes())
        digest.update(np.ascontiguousarray(column.offsets).tobytes())
    # All that decides the numbers, to their last bits.
    how = [
        config.distributed.precision.name,
        config.model.dtype.name,
        torch.get_num_threads(),
        world.processes,
        size,
        *(["packed", section.seq_length] if section.packing else []),
    ]
    weights = [context.parents.get("sft"), context.inputs.get("sft")]
    key = key_of({"pairs": digest.hexdigest(), "weights": weights, "how": how})
    path = context.cache / FOLDER / f"{key}.npy"
    return kept_tensor(path, "log-probabilities of the reference", compute, world)


def _sampled(
    config: Config,
    context: StageContext,
    policy: Policy,
    reference: Reference,
    codec: Codec,
    world: World,
    stack: ExitStack,
) -> Callable[[MetricAccumulator], object]:
    """Return what answers validation prompts and reports on it; nothing with `eval_prompts=0`.

    `stack` closes the engine that answers.
    """
    section, prompts = config.dpo, dpo_prompts(config, context, codec)
    if prompts is None:
        return lambda meters: None
    engine = rollout_engine(config, context, policy, codec, world, section.generation)
    stack.callback(engine.close)
    versions = count()
    request = rollout_request(config, codec, section.seed, section.generation)
    sampler = partial(engine.answer, request=request)
    answered = (policy, reference, sampler, prompts, len(prompts), section.generation, world)

    def sampled(meters: MetricAccumulator) -> None:
        engine.refresh(next(versions))
        sample_answers(*answered, meters)
        engine.release()

    return sampled
