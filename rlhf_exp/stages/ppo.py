"""The PPO stage: the SFT policy learns to please the reward, without straying far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from rlhf_exp.algo.rewards import RewardScaler
from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.config.ppo import ValueInit, ValueTrunk
from rlhf_exp.config.root import Config
from rlhf_exp.config.running import Strategy
from rlhf_exp.data.codec import Codec
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.experience import Collector
from rlhf_exp.engines.native.ppo import PpoTask
from rlhf_exp.engines.native.sample_scores import SharedTrunkScorer
from rlhf_exp.engines.native.scoring import Scorer
from rlhf_exp.engines.native.validation import Validator
from rlhf_exp.models.families import decoder_parts
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import Reference, reference_of
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.rollout.sampler import Sampling, sample
from rlhf_exp.rollout.stops import Stopper
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.originals import original_scores
from rlhf_exp.stages.ppo_settings import (
    controller,
    exact,
    experience_settings,
    ppo_settings,
    validation_settings,
    whole_steps,
)
from rlhf_exp.stages.prompts import ppo_prompts
from rlhf_exp.stages.saving import save_models
from rlhf_exp.stages.scorers import training_scorer
from rlhf_exp.stages.state import take_over
from rlhf_exp.stages.training import (
    keep_small_updates,
    load_policy_model,
    lora_of,
    parameter_facts,
    run_loop,
    world_for,
)

WATCH = ("reward/mean", "kl/sequence", "throughput/samples_per_s")
VALIDATION_STREAM = 1_000_003  # added to the seed of validation: training shares no noise with it


def run(config: Config, context: StageContext) -> StageResult:
    """Train, and leave the policy in `context.folder/model`."""
    section = config.ppo
    with world_for(config) as world:
        take_over(context, world)
        codec = context.materials.codec(context.models["sft"])
        prompts, validation = ppo_prompts(config, context, codec)
        policy = build_policy(config, context)
        policy.to(world.device)
        reference = reference_of(policy, world.weights_dtype)
        keep_small_updates(policy)
        scorer = training_scorer(config, context, codec, world, policy)
        settings = ppo_settings(section)
        task = PpoTask(
            policy,
            _collector(config, context, policy, reference, scorer, prompts, codec, world),
            _validator(config, policy, reference, scorer, validation, codec, world),
            settings,
            world,
        )
        steps = whole_steps(section.steps, settings.updates)
        conclude = partial(save_models, config, context, world, policy, codec.tokenizer)
        outcome = run_loop(config, section, steps, task, world, context, WATCH, conclude)
        if outcome.pruned:
            return StageResult({}, pruned_step=outcome.last_step)
        facts = parameter_facts(policy) | {"prompts": len(prompts), "cut_prompts": prompts.cut}
        return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)


def _collector(
    config: Config,
    context: StageContext,
    policy: Policy,
    reference: Reference,
    scorer: Scorer,
    prompts: TokenizedPrompts,
    codec: Codec,
    world: World,
) -> Collector:
    section = config.ppo
    originals = None
    if section.reward.delta:
        originals = original_scores(prompts, scorer, config, context, world)
    return Collector(
        policy,
        reference,
        sampler_for(config, policy, codec, world, section.seed, capture=True, scorer=scorer),
        scorer,
        prompts,
        originals,
        RewardScaler(section.reward.scale.value),
        controller(section),
        experience_settings(config),
        world,
    )


def _validator(
    config: Config,
    policy: Policy,
    reference: Reference,
    scorer: Scorer,
    prompts: TokenizedPrompts,
    codec: Codec,
    world: World,
) -> Validator:
    section = config.ppo
    seed = section.seed + VALIDATION_STREAM
    sampler = sampler_for(config, policy, codec, world, seed, capture=False)
    return Validator(
        policy, reference, sampler, scorer, prompts, codec, validation_settings(section), world
    )


def build_policy(config: Config, context: StageContext) -> Policy:
    """Return the SFT model with a value head, set up for training."""
    section = config.ppo
    own = section.value_trunk == ValueTrunk.own
    from_reward = section.value_init == ValueInit.reward
    judge = RewardModel.load(context.models["reward"]) if from_reward else None
    value_model = None
    if own and judge is None:
        value_model = load_policy_model(config, context.models["sft"])
    elif own and judge is not None:
        value_model = judge.trunk
    policy = Policy(
        load_policy_model(config, context.models["sft"]),
        train_blocks=section.train_blocks,
        lora=lora_of(section),
        value_head=True,
        value_model=value_model,
        value_branch=section.value_trunk == ValueTrunk.branch,
        seed=section.seed,
        # They hook into each block, and must see it called once and whole.
        whole_blocks=config.distributed.strategy in (Strategy.zero3, Strategy.fsdp),
    ).set_gradient_checkpointing(section.gradient_checkpointing)
    if judge is not None:
        assert policy.value_head is not None
        policy.value_head.copy_from(judge.head.weight, -float(judge.mean))
    return policy


def sampler_for(
    config: Config,
    policy: Policy,
    codec: Codec,
    world: World,
    seed: int,
    capture: bool,
    scorer: Scorer | None = None,
) -> Callable[[Prompts], Samples]:
    """Return a function that answers prompts as PPO's `generation` section says.

    Args:
        config: The experiment.
        policy: Who answers.
        codec: Of the policy.
        world: Device and precision.
        seed: Of the noise.
        capture: Whether to keep the states entering the first training block, where these are
            exact enough to train on.
        scorer: Who scores the answers; one that shares the policy's trunk reads these states, too.
    """
    section = config.ppo.generation
    settings = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        batch=section.batch,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
    )
    stopper = Stopper(codec.tokenizer, codec.stop_strings)
    block: nn.Module | None = None
    if capture and exact(config) and policy.cut is not None:
        block = decoder_parts(policy.model).blocks[policy.cut]

    close = codec.eos_id if isinstance(scorer, SharedTrunkScorer) else None

    def answer(prompts: Prompts) -> Samples:
        with world.autocast():
            return sample(policy.model, prompts, settings, seed, stopper, block, close)

    return answer
