"""Tables of a plan: its steps, parameter counts, and estimated memory of each process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from rlhf_exp.config.experiment import (
    UNTRAINED,
    Config,
    Dtype,
    ModelConfig,
    ShardOver,
    StrategyName,
)
from rlhf_exp.config.training import (
    CONTINUED,
    RewardInit,
    RolloutEngineName,
    TrainingConfig,
)
from rlhf_exp.models.architecture import TYPES, Architecture, count_lora, count_parameters
from rlhf_exp.models.memory_estimate import (
    FLOAT32,
    HALF_WITH_MASTER,
    MemoryEstimate,
    Precision,
    Sharding,
    Workload,
    estimate_memory,
    reward_bytes,
)
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.pipeline.stage_graph import stages_of
from rlhf_exp.stages.shape import shape_of

GIB = 1 << 30
GPUS = (24, 40, 80, 141)
"""Memory of common GPUs, in GB."""

NODE = 8
"""GPUs of a machine, where a plan cannot know it."""
_COLOURS = {
    StepState.given: "cyan",
    StepState.cached: "green",
    StepState.damaged: "red",
    StepState.changed: "red",
    StepState.resume: "yellow",
    StepState.run: "bold",
}


def plan_table(steps: list[Step]) -> Table:
    """Return a table of the steps and their states."""
    table = Table("stage", "key", "state", "what", box=None, pad_edge=False)
    for step in steps:
        what = ", ".join(step.files)
        if step.state == StepState.given and step.model is not None:
            what = step.model
        elif step.redo and step.artifact is not None:
            what = "again, replacing the result in the store"
        elif step.state == StepState.cached and step.files:
            what = f"trusted although changed: {what}"
        elif step.needs_work and CONTINUED in step.extra:
            what = f"goes on from {step.extra[CONTINUED].key}"
        elif step.artifact is not None and step.state == StepState.cached:
            what = f"made {step.artifact.manifest.created[:16]}"
        colour = _COLOURS[step.state]
        table.add_row(step.stage, step.key, f"[{colour}]{step.state}[/]", what)
    return table


def memory_table(config: Config) -> Table | Text:
    """Return parameter counts and estimated memory of each training stage, for one process.

    For a model of a family whose parameters are not counted here, a sentence that says so; the same
    if nothing trains.
    """
    stages = trained_stages(config)
    if not stages:
        return Text("nothing trains: every model is given")
    shape = shape_for(config.model)
    if shape is None:
        return Text(
            f"{config.model.path}: memory is estimated for {', '.join(TYPES)} only; probe=true "
            "measures it"
        )
    total = count_parameters(shape).total
    apart = _reward_apart(config, shape) if "ppo" in stages else ""
    table = Table(
        caption=f"{config.model.name}: {count_text(total)} parameters; GiB per process{apart}",
        caption_justify="left",
        min_width=60,
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    estimates = [stage_memory(config, stage, shape) for stage in stages]
    trained = [_trained(getattr(config, stage), shape) for stage in stages]
    table.add_row("trains", *(count_text(number) for number in trained))
    for label, name in (
        ("weights", "weights"),
        ("gathered to update", "gathered"),
        ("gathered to sample", "gathered_to_sample"),
        ("gradients", "gradients"),
        ("communication", "communication"),
        ("optimizer", "optimizer"),
        ("activations", "activations"),
        ("logits chunk", "logits"),
        ("KV cache", "kv_cache"),
        ("trunk states", "trunk_states"),
        ("reference", "reference"),
        ("reward model", "reward_model"),
        ("rollout copy", "rollout_copy"),
        ("host memory", "host"),
    ):
        table.add_row(label, *(gib(getattr(found, name)) for found in estimates))
    table.add_row("[bold]peak", *(f"[bold]{gib(found.peak)}" for found in estimates))
    for size in GPUS:
        table.add_row(
            f"fits {size} GB", *("yes" if fits(found, size) else "no" for found in estimates)
        )
    return table


def trained_stages(config: Config) -> list[str]:
    """Return the stages of a plan that train: their memory is estimated."""
    stages = [stage for stage in stages_of(config) if stage not in UNTRAINED]
    return [stage for stage in stages if getattr(config, stage).use is None]


def fits(estimate: MemoryEstimate, size: int) -> bool:
    """Return whether a process fits into a GPU of `size` GB.

    With a GiB for the CUDA context, and a tenth for the allocator's fragmentation.
    """
    return estimate.peak * 1.1 + GIB <= size * GIB


def _reward_apart(config: Config, shape: Architecture) -> str:
    """Return in words what the main process holds besides, where it has the reward model alone."""
    reward = config.ppo.reward
    if reward.device is None or not reward.model_scores:
        return ""
    size = gib(reward_bytes(shape, _precision(config, "ppo")))
    place = "host memory" if reward.gpu is None else f"GPU {reward.gpu} of its machine"
    return f";\nfor PPO the main process also has the reward model, {size} GiB, in {place}"


def shape_for(section: ModelConfig) -> Architecture | None:
    """Return the model's shape: a folder's own, else what the config says of it.

    `None` for a folder's model of a family that `Architecture` does not describe.
    """
    if section.path is not None and Path(section.path).is_dir():
        # Only here: transformers and torch take seconds to import.
        from rlhf_exp.models import pretrained

        config = pretrained.load_config(section.path)
        return pretrained.architecture_of(config) if config.model_type in TYPES else None
    return shape_of(section.architecture)


def stage_memory(config: Config, stage: str, shape: Architecture) -> MemoryEstimate:
    """Return the estimate of one stage."""
    section: TrainingConfig = getattr(config, stage)
    processes = config.distributed.processes
    share = -(-section.batch // processes)
    rows = min(section.micro_batch or share, share)
    blocks, rank = section.train_blocks, section.lora.rank
    length = getattr(section, "seq_length")  # noqa: B009 - each stage has its own
    estimate = partial(
        estimate_memory,
        shape,
        precision=_precision(config, stage),
        sharding=_sharding(config),
        train_blocks=blocks,
        lora_rank=rank,
        sampled_bytes=_sampled_bytes(config, stage),
    )
    checkpointing, accumulates = section.gradient_checkpointing, rows < share
    if stage == "sft":
        work = Workload(rows, length, length, checkpointing, accumulates=accumulates)
        return estimate(work)
    if stage == "reward":
        work = Workload(2 * rows, length, 0, checkpointing, accumulates=accumulates)
        return estimate(work)
    reference: Literal["none", "lora", "full", "shared"] = (
        "lora" if rank else "full" if blocks is None else "shared"
    )
    if stage == "dpo":
        dpo = config.dpo
        asked = -(-dpo.eval_prompts // processes)
        work = Workload(
            2 * rows,
            length,
            length,
            checkpointing,
            decoded_rows=min(dpo.generation.batch, asked),
            accumulates=accumulates,
        )
        return estimate(work, reference=reference if asked else "none")
    ppo = config.ppo
    rollouts = -(-ppo.rollouts // processes)
    work = Workload(
        rows,
        length,
        ppo.generation.max_new_tokens,
        checkpointing,
        decoded_rows=min(ppo.generation.batch, rollouts),
        cached_rows=rollouts if blocks is not None else 0,
        accumulates=accumulates,
    )
    judge = shape if ppo.reward.model_scores and ppo.reward.device is None else None
    return estimate(
        work,
        reference=reference,
        reward_model=judge,
        reward_blocks=blocks if shares_trunk(config) else None,
        value_blocks={"shared": 0, "branch": blocks or 0, "own": shape.layers}[
            ppo.value_trunk.name
        ],
    )


def shares_trunk(config: Config) -> bool:
    """Whether the reward model has its trunk from the policy, as far as the config tells."""
    reward, ppo = config.reward, config.ppo
    strategy = config.distributed.strategy
    spread = strategy in (StrategyName.zero3, StrategyName.fsdp)
    deep = strategy in (StrategyName.zero1, StrategyName.zero2)
    cast = deep and config.computes_in != config.model.dtype == Dtype.float32
    if spread or cast or ppo.gradient_checkpointing or reward.use or reward.init is RewardInit.base:
        return False
    judge = ppo.reward
    if not judge.model_scores or judge.terms or judge.device is not None:
        return False  # several rewards are models of their own, and another device has no trunk
    return 0 < (reward.train_blocks or 0) <= (ppo.train_blocks or 0)


def _sampled_bytes(config: Config, stage: str) -> int:
    """Return the bytes of a weight in the copy that samples (`stages.sampling`); 0: none."""
    section = config.dpo.generation if stage == "dpo" else config.ppo.generation
    if section.engine is RolloutEngineName.vllm:
        return 0  # its weights are in processes of its own
    half = config.computes_in is Dtype.bfloat16
    replicated = config.distributed.strategy in (StrategyName.single, StrategyName.ddp)
    ahead = stage == "ppo" and config.ppo.generation.ahead > 0
    if not ahead and not (half and replicated):
        return 0
    return 2 if half else 4


def _precision(config: Config, stage: str) -> Precision:
    """Return the bytes of numbers: what trains is held in float32, by DeepSpeed as a copy.

    In float32, too: whether it needs none it decides by comparing a device with a name, which are
    never equal. Of frozen weights that are rounded, there are copies on the host.
    """
    strategy = config.distributed.strategy
    frozen = 2 if config.model.dtype == Dtype.bfloat16 else 4
    half = config.computes_in is Dtype.bfloat16
    if strategy in (StrategyName.zero1, StrategyName.zero2, StrategyName.zero3):
        if half:
            return replace(HALF_WITH_MASTER, beside=frozen, exact=4 if frozen == 4 else 0)
        return replace(FLOAT32, optimizer=12)
    gathered = 2 if half and strategy == StrategyName.fsdp else 4
    # PPO holds what is frozen in the format that it computes in (`World.round_frozen`).
    rounds = stage == "ppo" and half and strategy != StrategyName.fsdp and frozen == 4
    return Precision(
        weight=2 if rounds else frozen,
        activation=2 if half else 4,
        gathered=gathered,
        beside=frozen,
        exact=4 if rounds else 0,
    )


def _sharding(config: Config) -> Sharding:
    section = config.distributed
    strategy = section.strategy
    whole = strategy in (StrategyName.zero3, StrategyName.fsdp)
    deep = strategy in (StrategyName.zero1, StrategyName.zero2, StrategyName.zero3)
    node = section.shard_over is ShardOver.node
    return Sharding(
        min(section.processes, NODE) if node else section.processes,
        optimizer=whole or deep,
        gradients=whole or strategy == StrategyName.zero2,
        weights=whole,
        blocks=strategy == StrategyName.fsdp,
        bucket=deep,
        overlaps=deep and not whole,
        keeps_gradients=strategy in (StrategyName.ddp, StrategyName.zero3),
        offload=section.offload,
    )


def _trained(section: TrainingConfig, shape: Architecture) -> int:
    if section.lora.rank:
        return count_lora(shape, section.lora.rank, section.train_blocks)
    return count_parameters(shape).trainable(section.train_blocks, shape.tied)


def count_text(number: int) -> str:
    """Return a number of parameters as the tables show it."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def gib(size: int) -> str:
    """Return bytes in GiB, as the tables show them."""
    return f"{size / GIB:.3f}" if size < GIB else f"{size / GIB:.1f}"
