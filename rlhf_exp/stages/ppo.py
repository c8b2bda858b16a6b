"""The PPO stage: the SFT policy learns to please the reward, without straying far.

It builds policy, reference, scorer, sampler and validation from the config and hands them to
`training/ppo.py`. With `ppo.continue_from` it first copies the state of the finished run that it
extends.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

from rlhf_exp.algo.advantages import RewardScaler
from rlhf_exp.algo.kl import AdaptiveKL, FixedKL, KLController
from rlhf_exp.config.experiment import Config, StrategyName
from rlhf_exp.config.training import CONTINUED, PpoConfig, ValueInit, ValueTrunk
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import Reference, build_reference
from rlhf_exp.models.reward_model import RewardModel, share_frozen_trunk
from rlhf_exp.rollout.ahead_engine import AheadEngine
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.ppo_inputs import (
    original_scores,
    ppo_prompts,
    set_prompt_rows,
)
from rlhf_exp.stages.publish import save_models
from rlhf_exp.stages.sampling import correction_of, rollout_engine, rollout_request
from rlhf_exp.stages.scorers import SERVER_NOTE, longest_input, scorer_for
from rlhf_exp.stages.setup import attention_of, cache_of, load_policy_model, torch_dtype, world_for
from rlhf_exp.stages.training import (
    keep_small_updates,
    lora_of,
    parameter_facts,
    run_loop,
)
from rlhf_exp.store.artifact import Manifest
from rlhf_exp.store.atomic_files import write_text_atomic
from rlhf_exp.tracking.local import ALERTS, METRICS, STEP
from rlhf_exp.training.ppo import ExperienceCollector, PpoTask
from rlhf_exp.training.ppo_validation import Validator
from rlhf_exp.training.reward_scorer import Scorer, SharedTrunkScorer
from rlhf_exp.training.scorers import CentralScorer, ServerScorer
from rlhf_exp.training.streamed_scoring import StreamedScorer
from rlhf_exp.training.trainer import TrainingProgress

WATCH = ("reward/mean", "kl/sequence", "throughput/samples_per_s")
VALIDATION_STREAM = 1_000_003  # added to the seed of validation: training shares no noise with it


def run(config: Config, context: StageContext) -> StageResult:
    """Train, and leave the policy in `context.folder/model`."""
    section = config.ppo
    with world_for(config) as world:
        copy_resume_state(context, world)
        codec = context.materials.codec(context.models["sft"])
        prompts, validation = ppo_prompts(config, context, codec)
        policy = build_policy(config, context, world.has_weights)
        if not world.setup.divides_weights:
            policy.to(world.device)
        keep_small_updates(policy)
        # After it: mixed precision computes otherwise with weights in float32 than in bfloat16.
        reference = build_reference(policy, world.weights_dtype, world.place)
        scorer = training_scorer(config, context, codec, world, policy)
        set_prompt_rows(scorer, context, prompts, validation)
        world.round_frozen(policy)
        steps = section.iterations * section.updates
        conclude = partial(save_models, config, context, world, policy, codec.tokenizer)
        shares_trunk = isinstance(scorer, SharedTrunkScorer)
        # What is sampled ahead goes through a checkpoint, which has no room for states.
        capture = section.generation.ahead == 0
        request = rollout_request(config, codec, section.seed, capture=capture, close=shares_trunk)
        with closing(_engine(config, context, policy, codec, request, world)) as engine:
            task = PpoTask(
                policy,
                engine,
                _collector(
                    config, context, policy, reference, engine, request, scorer, prompts, world
                ),
                _validator(config, policy, reference, engine, scorer, validation, codec, world),
                section,
                world,
            )
            outcome = run_loop(config, section, steps, task, world, context, WATCH, conclude)
        if outcome.pruned:
            return StageResult({}, pruned_step=outcome.last_step)
        facts = parameter_facts(policy) | {"prompts": len(prompts), "cut_prompts": prompts.cut}
        facts |= context.materials.facts()
        return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)


def _engine(
    config: Config,
    context: StageContext,
    policy: Policy,
    codec: Codec,
    request: RolloutRequest,
    world: World,
) -> RolloutEngine:
    """Return the engine that samples, one iteration ahead where the config says so."""
    if config.ppo.generation.ahead == 0:
        return rollout_engine(config, context, policy, codec, world)
    beside = world.for_thread()
    engine = rollout_engine(config, context, policy, codec, beside, ahead=True)
    return AheadEngine(engine, request)


def _collector(
    config: Config,
    context: StageContext,
    policy: Policy,
    reference: Reference,
    engine: RolloutEngine,
    request: RolloutRequest,
    scorer: Scorer,
    prompts: TokenizedPrompts,
    world: World,
) -> ExperienceCollector:
    section = config.ppo
    originals = None
    if section.reward.delta:
        originals = original_scores(prompts, scorer, config, context, world)
    sampler: Sampler = partial(engine.answer, request=request)
    elsewhere = _elsewhere(config, scorer, world)
    if elsewhere is not None:
        scorer = streamed = StreamedScorer(elsewhere, engine, request)
        sampler = streamed.sample
    return ExperienceCollector(
        policy,
        reference,
        sampler,
        scorer,
        prompts,
        originals,
        RewardScaler(section.reward.scale.value),
        controller(section),
        section,
        world,
        correction_of(config),
        request.close if cache_of(config) == "slots" else None,
        engine if isinstance(engine, AheadEngine) else None,
    )


def _elsewhere(config: Config, scorer: Scorer, world: World) -> Scorer | None:
    """Return the scorer for a thread beside sampling; `None` for one that would be in its way."""
    if isinstance(scorer, ServerScorer):
        return scorer
    if isinstance(scorer, CentralScorer) and config.ppo.reward.gpu is not None:
        return CentralScorer(scorer.scorer, world.for_thread())
    return None


def _validator(
    config: Config,
    policy: Policy,
    reference: Reference,
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: TokenizedPrompts,
    codec: Codec,
    world: World,
) -> Validator:
    section = config.ppo
    request = rollout_request(config, codec, section.seed + VALIDATION_STREAM)
    sampler = partial(engine.answer, request=request)
    return Validator(policy, reference, sampler, scorer, prompts, codec, section, world)


def build_policy(config: Config, context: StageContext, weights: bool = True) -> Policy:
    """Return the SFT model with a value head, set up for training.

    Args:
        config: The experiment.
        context: Names the folders of the models.
        weights: Whether this process loads them (`World.has_weights`).
    """
    section = config.ppo
    load = partial(load_policy_model, config, context.models["sft"], weights=weights)
    own = section.value_trunk == ValueTrunk.own
    from_reward = section.value_init == ValueInit.reward
    judge = None
    if from_reward:
        judge = RewardModel.load(context.models["reward"], weights=weights)
    value_model = None
    if own and judge is None:
        value_model = load()
    elif own and judge is not None:
        value_model = judge.trunk
    policy = Policy(
        load(),
        train_blocks=section.train_blocks,
        lora=lora_of(section),
        value_head=section.uses_values,
        value_model=value_model,
        value_branch=section.value_trunk == ValueTrunk.branch,
        seed=section.seed,
        # They hook into each block, and must see it called once and whole.
        run_all_positions=config.distributed.strategy in (StrategyName.zero3, StrategyName.fsdp),
    ).set_gradient_checkpointing(section.gradient_checkpointing)
    if judge is not None:
        assert policy.value_head is not None
        policy.value_head.copy_from(judge.head.weight, -float(judge.mean))
    return policy


def training_scorer(
    config: Config, context: StageContext, codec: Codec, world: World, policy: Policy
) -> Scorer:
    """Return PPO's scorer: over the policy's own frozen trunk if the reward model has the same.

    Args:
        config: The experiment.
        context: Names the folder of the reward model.
        codec: The policy's codec.
        world: The processes; device and precision.
        policy: The policy, before it is trained or spread over processes.
    """
    # DeepSpeed would turn the trunk into another number format; ZeRO-3 and FSDP spread it.
    cast = world.weights_dtype not in (None, torch_dtype(config))
    cannot_share = policy.run_all_positions or cast or config.ppo.reward.device is not None
    alone = config.ppo.reward.model_scores and not config.ppo.reward.terms
    folder = context.models["reward"] if alone else None
    if folder is None or cannot_share or context.materials.codec(folder).digest != codec.digest:
        return scorer_for(config, context, codec, world)
    model = RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config))
    branch = share_frozen_trunk(model, policy)
    if branch is None:
        return scorer_for(config, context, codec, world, model)
    batch = config.ppo.generation.batch
    model.to(world.device)
    return SharedTrunkScorer(model, branch, codec, world, batch, longest_input(config))


def controller(section: PpoConfig) -> KLController:
    """Return what sets the KL coefficient."""
    kl = section.kl
    return FixedKL(kl.coef) if kl.target is None else AdaptiveKL(kl.coef, kl.target, kl.horizon)


CHECKPOINTS, BEST, KEPT = "checkpoints", "best", "kept"
"""Folders of a run's state: the last checkpoint, the best weights so far, snapshots."""

_EVALUATION = "eval/"


def copy_resume_state(context: StageContext, world: World) -> None:
    """Copy the state of the run that is extended into the staging folder, unless it is there.

    Raises:
        UserError: That run started from other weights than this one would.
    """
    source = context.models.get(CONTINUED)
    if source is not None and context.probe is None:
        world.run_on_all(lambda: _copy_state(Path(source), context) if world.is_main else None)


def _copy_state(source: Path, context: StageContext) -> None:
    target = context.folder
    if (target / CHECKPOINTS).is_dir():
        return
    inputs = Manifest.read(source).inputs
    changed = [
        role for role, digest in context.inputs.items() if inputs.get(role, digest) != digest
    ]
    if changed := [role for role in changed if role != CONTINUED]:
        raise UserError(
            f"ppo.continue_from: {source.name} was made from other weights of {', '.join(changed)} "
            "than there are now; make it again (rerun=[ppo], without ppo.continue_from)"
        )
    context.before_write()
    for name in (BEST, KEPT, "tables"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    notes = [path.name for path in source.glob(f"{Path(SERVER_NOTE).stem}*.json")]
    for name in (METRICS, ALERTS, *notes):
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
    partial = target / f".{CHECKPOINTS}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / CHECKPOINTS, partial)
    _remove_final_evaluation(target, partial)
    # Last: where it is, all is there.
    partial.rename(target / CHECKPOINTS)


def _remove_final_evaluation(folder: Path, checkpoints: Path) -> None:
    """Remove what was logged only because the run ended: the evaluation of its last step."""
    newest = sorted(checkpoints.glob("step-*"))[-1]
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    step = state["step"]
    if TrainingProgress.of(state, step + 1).last_eval == step:
        return
    path = folder / METRICS
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text_atomic(path, "".join(row for row in rows if not _is_evaluation(row, step)))
    for table in (folder / "tables").rglob(f"*-{step}.jsonl"):
        table.unlink()


def _is_evaluation(line: str, step: int) -> bool:
    row = json.loads(line)
    return row[STEP] == step and any(name.startswith(_EVALUATION) for name in row)
