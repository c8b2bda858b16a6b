"""What a config says of the operations and bytes of a PPO iteration; without torch, as a plan."""

from __future__ import annotations

from rlhf_exp.config.experiment import Attention, Config, Dtype, StrategyName
from rlhf_exp.config.training import RolloutEngineName
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.time_estimate import Iteration, Models, Work, iteration_work
from rlhf_exp.pipeline.plan_table import shares_trunk


def models_of(config: Config, shape: Architecture) -> Models:
    """Return what an iteration computes with.

    Args:
        config: The experiment.
        shape: Of the policy, and of a reward model that a stage makes or is given.
    """
    ppo, half = config.ppo, config.computes_in is Dtype.bfloat16
    blocks = ppo.train_blocks
    strategy = config.distributed.strategy
    native = ppo.generation.engine is RolloutEngineName.native
    spread = strategy in (StrategyName.zero3, StrategyName.fsdp)
    deep = strategy in (StrategyName.zero1, StrategyName.zero2)
    values = {"shared": 0, "branch": blocks or 0, "own": shape.layers}[ppo.value_trunk.name]
    return Models(
        shape,
        blocks,
        ppo.lora.rank,
        values if ppo.uses_values else 0,
        reward=shape if ppo.reward.model_scores else None,
        # All that is above the policy's trunk, though fewer of its blocks may have been trained.
        reward_blocks=blocks if shares_trunk(config) else None,
        weight_bytes=2 if half else 4,
        captures_states=not half and native and ppo.generation.ahead == 0,
        checkpointing=ppo.gradient_checkpointing,
        # GPT-J's attention is always written out.
        skips_masked=shape.type != "gptj" and config.model.attention is not Attention.eager,
        runs_all_positions=spread,
        optimizer_share=1 / config.distributed.processes if spread or deep else 1.0,
    )


def sizes_of(config: Config, prompt: float, response: float) -> Iteration:
    """Return the sizes of an iteration, as one process has it.

    Args:
        config: The experiment.
        prompt: Mean tokens of a prompt.
        response: Mean tokens of a response.
    """
    ppo, processes = config.ppo, config.distributed.processes
    share, rows = -(-ppo.batch // processes), -(-ppo.rollouts // processes)
    together = min(ppo.generation.batch, rows)
    return Iteration(
        rows=rows,
        prompt=prompt,
        response=response,
        decoded_rows=together,
        scored_rows=together,
        epochs=ppo.epochs,
        updates=ppo.updates,
        micro_batch=min(ppo.micro_batch or share, share),
    )


def work_of(
    config: Config, shape: Architecture, prompt: float, response: float
) -> dict[str, dict[str, Work]]:
    """Return the parts of each phase, with the work of all processes together.

    Args:
        config: The experiment.
        shape: Of the policy, and of a reward model that a stage makes or is given.
        prompt: Mean tokens of a prompt.
        response: Mean tokens of a response.
    """
    work = iteration_work(models_of(config, shape), sizes_of(config, prompt, response))
    processes = config.distributed.processes
    return {
        phase: {name: part * processes for name, part in parts.items()}
        for phase, parts in work.items()
    }
