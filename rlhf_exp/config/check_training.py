"""Rules for `sft`, `reward` and `ppo`."""

from __future__ import annotations

from rlhf_exp.config.check_model import context_length, layer_count
from rlhf_exp.config.ppo import ValueInit, ValueTrunk
from rlhf_exp.config.problems import Findings
from rlhf_exp.config.training import Select


def check_training(found: Findings, stage: str) -> None:
    """Report what is wrong with the fields that all training stages have.

    Args:
        found: Collects the problems.
        stage: `sft`, `reward` or `ppo`.
    """
    key = f"{stage}.".__add__
    found.positive(key("lr"), key("grad_norm"), key("lora.alpha"), key("epochs"))
    intervals = ("eval_every", "checkpoint_every", "keep_checkpoints", "keep_every")
    found.at_least(1, *map(key, ("batch", "micro_batch", "steps", "train_blocks", *intervals)))
    found.at_least(0, *map(key, ("seed", "warmup_steps", "weight_decay", "lora.rank")))
    betas = found.value(key("betas"))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        found.add(key("betas"), "needs two numbers in [0, 1), such as [0.9,0.95].")
    batch, micro = found.value(key("batch")), found.value(key("micro_batch"))
    if micro is not None and micro > batch:
        found.add(key("micro_batch"), f"is more than {stage}.batch, {batch} rows.")
    if stage != "ppo":
        _check_length(found, stage)
    blocks, layers = found.value(key("train_blocks")), layer_count(found.config.model)
    if blocks is not None and layers is not None and blocks > layers:
        found.add(key("train_blocks"), f"the model has {layers} blocks; null trains everything.")
    if blocks is not None and found.value(key("lora.rank")) > 0:
        message = f"choose one: {stage}.train_blocks, or LoRA with {stage}.lora.rank."
        found.add(key("train_blocks"), message)


def _check_length(found: Findings, stage: str) -> None:
    steps, epochs = found.value(f"{stage}.steps"), found.value(f"{stage}.epochs")
    if steps is None and epochs is None:
        found.add(f"{stage}.steps", f"set {stage}.steps or {stage}.epochs.")
    if steps is not None and epochs is not None:
        message = f"{stage}.epochs is set too, to {epochs:g}; set one of them to null."
        found.add(f"{stage}.steps", message)


def check_sequence(found: Findings, stage: str) -> None:
    """Report a sequence length that the model cannot read."""
    length, context = found.value(f"{stage}.seq_length"), context_length(found.config.model)
    found.at_least(2, f"{stage}.seq_length")
    if context is not None and length > context:
        found.add(f"{stage}.seq_length", f"the model's context is {context} tokens.")


def check_ppo(found: Findings) -> None:
    """Report what is wrong with PPO's own fields."""
    ppo = found.config.ppo
    found.at_least(1, "ppo.rollouts", "ppo.eval_prompts", "ppo.generation.batch")
    found.at_least(1, "ppo.generation.max_new_tokens", "ppo.kl.horizon")
    found.at_least(0, "ppo.vf_coef", "ppo.entropy_coef", "ppo.kl.coef", "ppo.kl.select_coef")
    found.at_least(0, "ppo.reward.missing_eos_penalty")
    found.positive("ppo.clip_range", "ppo.clip_range_value", "ppo.kl.target", "ppo.kl.stop")
    found.positive("ppo.kl.budget")
    if ppo.kl.budget is not None and ppo.kl.select_coef is not None:
        found.add("ppo.kl.select_coef", "with ppo.kl.budget nothing is subtracted; set one.")
    if ppo.kl.budget is not None and ppo.select is Select.last:
        found.add("ppo.kl.budget", "ppo.select=last takes the last weights; use ppo.select=best.")
    found.positive("ppo.reward.clip", "ppo.generation.temperature")
    for name in ("gamma", "lam"):
        found.unless(0 <= getattr(ppo, name) <= 1, f"ppo.{name}", "must be in [0, 1].")
    if ppo.batch > ppo.rollouts:
        message = f"an iteration has only ppo.rollouts={ppo.rollouts} of them."
        found.add("ppo.batch", message)
    if ppo.generation.max_new_tokens >= ppo.seq_length:
        message = f"leaves no room for a prompt in ppo.seq_length={ppo.seq_length}."
        found.add("ppo.generation.max_new_tokens", message)
    if ppo.kl.target is not None and ppo.kl.coef == 0:
        message = "an adaptive controller cannot leave 0; set ppo.kl.target=null for no penalty."
        found.add("ppo.kl.coef", message)
    if ppo.kl.stop is not None and ppo.kl.target is not None and ppo.kl.stop <= ppo.kl.target:
        found.add("ppo.kl.stop", f"must be above the target that KL aims at, {ppo.kl.target:g}.")
    if ppo.value_trunk is ValueTrunk.branch:
        _check_branch(found)
    modelless = not ppo.reward.model_scores and found.config.reward.use is None
    if modelless and ppo.value_init is ValueInit.reward:
        message = f"with a {ppo.reward.kind} there is no reward model; use value_init=small."
        found.add("ppo.value_init", message)


def _check_branch(found: Findings) -> None:
    ppo = found.config.ppo
    if ppo.train_blocks is None or ppo.lora.rank:
        message = "a branch needs a frozen trunk: set ppo.train_blocks, without LoRA, or use own."
        found.add("ppo.value_trunk", message)
    if ppo.value_init is ValueInit.reward:
        message = (
            "the reward model's head reads its own trunk; use value_trunk=own or value_init=small."
        )
        found.add("ppo.value_init", message)
