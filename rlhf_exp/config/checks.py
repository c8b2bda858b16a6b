"""Checks of a whole config before anything is loaded or started.

`config_problems` runs them and returns all problems at once. A check looks at the config, at files
that it names and at installed packages; it never loads a model or data, and never uses the network.
Rules for `model`, user functions and addresses are in `checks_shared`, those for `eval` in
`checks_evaluation`, those for a study in `search_space`, those for a multirun in `checks_sweep`.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from rlhf_exp.config.checks_engines import check_engine
from rlhf_exp.config.checks_evaluation import check_eval
from rlhf_exp.config.checks_rollout import check_rollout_engine
from rlhf_exp.config.checks_shared import (
    check_address,
    check_function,
    check_model,
    check_reward_function,
    check_secrets,
    context_length,
    layer_count,
)
from rlhf_exp.config.experiment import (
    CHOSEN,
    UNTRAINED,
    Attention,
    Config,
    DataSource,
    FurtherTracker,
    PromptFormat,
    ShardOver,
    StageName,
    StrategyName,
)
from rlhf_exp.config.problems import ConfigChecker, Problem
from rlhf_exp.config.search_space import check_study
from rlhf_exp.config.training import (
    CORRECTION_AUTO,
    AdvantageEstimator,
    Combine,
    DpoLoss,
    GroupScale,
    KlEstimator,
    KlPlace,
    PpoConfig,
    RewardInit,
    Schedule,
    Select,
    ValueInit,
    ValueTrunk,
)

_SECTIONS_USED = {
    StageName.sft: ("sft",),
    StageName.reward: ("sft", "reward"),
    StageName.dpo: ("sft", "dpo"),
    StageName.best_of: ("sft", "reward", "best_of"),
    StageName.ppo: ("sft", "reward", "ppo"),
    StageName.eval: ("sft", "reward", "ppo", "eval"),
    StageName.pipeline: ("sft", "reward", "ppo", "eval"),
}


def config_problems(config: Config, multirun: bool = False) -> list[Problem]:
    """Return all problems of a config.

    Sections that the chosen stage does not need are skipped, and so is the training of a stage
    whose result is given by `use`. Relative paths start at the current directory.

    Args:
        config: The experiment.
        multirun: Whether the config is one point of a multirun.
    """
    check = ConfigChecker(config)
    sections = ("eval",) if _evaluates_stored_answers(config) else _SECTIONS_USED[config.stage]
    if "eval" in sections and "dpo" in config.eval.models:
        sections = (*sections, "dpo")
    _check_run(check, multirun)
    check_secrets(check)
    check_model(check)
    check_data(check)
    for stage in ("sft", "reward", "dpo", "ppo"):
        if stage in sections and check.value(f"{stage}.use") is None:
            check_training(check, stage)
            check_sequence(check, stage)
    if "reward" in sections and config.reward.use is None:
        _check_reward(check)
    given = config.reward.use is not None or config.ppo.reward.term_models
    if config.reward.trunk is not None and not given:
        check.add("reward.trunk", "is of a reward model that is given; set reward.use too.")
    if "dpo" in sections and config.dpo.use is None:
        _check_dpo(check)
    if "ppo" in sections and config.ppo.use is None:
        check_ppo(check)
    if "best_of" in sections:
        _check_best_of(check)
    if {"best_of", "ppo"} & set(sections):
        check_reward_source(check)
    if "ppo" in sections:
        check_continue_from(check)
    check_engine(check, [stage for stage in sections if _trains(config, stage)])
    if not _evaluates_stored_answers(config):
        sample = ("best_of", "eval")
        stages = [stage for stage in sections if stage in sample or _trains(config, stage)]
        check_rollout_engine(check, stages)
    if "eval" in sections:
        check_eval(check)
    _check_distributed_and_tracking(check)
    if config.study.trials is not None:
        check_study(check, config_problems)
    return check.problems


def _trains(config: Config, stage: str) -> bool:
    """Return whether a stage may be trained, as far as the config says."""
    if stage in UNTRAINED or getattr(config, stage).use is not None:
        return False
    compared = config.stage is StageName.eval and stage in ("dpo", "ppo")
    return not compared or stage in config.eval.models


def _evaluates_stored_answers(config: Config) -> bool:
    """Return whether the evaluation only reads stored answers, so that no model is used."""
    return config.stage is StageName.eval and config.eval.samples is not None


def _check_best_of(check: ConfigChecker) -> None:
    check.at_least(2, "best_of.n")
    check.at_least(1, "best_of.prompts", "ppo.generation.batch", "ppo.generation.max_new_tokens")
    check.at_least(0, "best_of.seed")
    check.positive("ppo.generation.temperature")
    check_sequence(check, "ppo")


def _check_run(check: ConfigChecker, multirun: bool) -> None:
    config = check.config
    if multirun and config.name is None:
        check.add("name", "a multirun needs a name, for its report: name=my_sweep.")
    if config.name is not None:
        valid = re.fullmatch(r"[A-Za-z0-9][\w.-]*", config.name, re.ASCII)
        check.require(valid is not None, "name", "use letters, digits, and . _ - inside.")
        check.require(config.name != "latest", "name", "`latest` always means the latest run.")
    check.at_least(0, "seed")
    stages = [stage.name for stage in StageName if stage is not StageName.pipeline]
    unknown = [stage for stage in config.rerun if stage not in stages]
    check.require(not unknown, "rerun", f"the stages are {', '.join(stages)}.")
    _check_output(check)


def _check_output(check: ConfigChecker) -> None:
    """Report an output folder that cannot be made, or in which nothing can be written."""
    output = Path(check.config.output_dir).expanduser().absolute()
    existing = next(path for path in (output, *output.parents) if os.path.lexists(path))
    if not existing.is_dir():
        check.add("output_dir", f"{existing} is not a folder; name another one.")
    elif existing != output or not check.config.plan:
        # The file system alone knows: permissions say nothing to root, or of a read-only mount.
        try:
            Path(tempfile.mkdtemp(prefix=".writable-", dir=existing)).rmdir()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            check.add("output_dir", f"nothing can be made in {existing} ({reason}); name another.")


def _check_reward(check: ConfigChecker) -> None:
    config = check.config
    _check_part(check, "reward.part")
    if config.reward.init is RewardInit.base and config.model.path is None:
        check.add("reward.init", "a model from scratch has no base weights; use reward.init=sft.")


def _check_part(check: ConfigChecker, key: str) -> None:
    part = check.value(key)
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part or "1/1")
    if match is None or int(match[1]) > int(match[2]):
        check.add(key, "expected one part of how many, such as 1/2.")


def _check_dpo(check: ConfigChecker) -> None:
    dpo = check.config.dpo
    _check_part(check, "dpo.part")
    check.positive("dpo.beta", "dpo.generation.temperature")
    check.at_least(0, "dpo.eval_prompts")
    check.at_least(1, "dpo.generation.batch", "dpo.generation.max_new_tokens")
    if dpo.packing and check.config.model.attention is Attention.flash_attention_2:
        message = "flash attention takes no packed rows; use model.attention=sdpa, or no packing."
        check.add("dpo.packing", message)
    if not 0 <= dpo.label_smoothing < 0.5:
        check.add("dpo.label_smoothing", "must be at least 0 and below 0.5.")
    elif dpo.label_smoothing and dpo.loss is not DpoLoss.sigmoid:
        message = f"is of dpo.loss=sigmoid; leave it out with {dpo.loss.name}."
        check.add("dpo.label_smoothing", message)
    if dpo.generation.max_new_tokens >= dpo.seq_length:
        message = f"leaves no room for a prompt in dpo.seq_length={dpo.seq_length}."
        check.add("dpo.generation.max_new_tokens", message)


def _check_distributed_and_tracking(check: ConfigChecker) -> None:
    config = check.config
    check.at_least(1, "distributed.processes", "distributed.threads")
    strategy = config.distributed.strategy
    if strategy is StrategyName.single and config.distributed.processes > 1:
        message = "distributed.strategy=single has one process; choose a strategy, such as "
        check.add("distributed.processes", message + "distributed=ddp.")
    if config.distributed.offload and strategy in (StrategyName.single, StrategyName.ddp):
        message = f"distributed.strategy={strategy.name} cannot offload; zero1 to 3 and fsdp can."
        check.add("distributed.offload", message)
    if config.distributed.shard_over is ShardOver.node and strategy is not StrategyName.fsdp:
        message = f"node is for fsdp, and distributed.strategy={strategy.name}; leave it out."
        check.add("distributed.shard_over", message)
    if strategy.name.startswith("zero") and not config.plan:
        message = "needs DeepSpeed: `pip install deepspeed` (extra `deepspeed`)."
        check.require(find_spec("deepspeed") is not None, "distributed.strategy", message)
    check.require(bool(config.tracking.project.strip()), "tracking.project", "must not be empty.")
    if FurtherTracker.tensorboard in config.tracking.also and not config.plan:
        message = "needs tensorboard: `pip install tensorboard` (extra `tensorboard`)."
        check.require(find_spec("tensorboard") is not None, "tracking.also", message)
    alerts = "tracking.alerts."
    check.positive(*(alerts + name for name in ("kl_factor", "reward_drop", "entropy_fraction")))


_FILE_FIELDS = ("preferences", "demonstrations", "prompts", "test")


def check_data(check: ConfigChecker) -> None:
    """Report the problems of `data`, missing files included."""
    data = check.config.data
    if data.source is DataSource.hub:
        check.require(data.path is not None, "data.path", "data.source=hub needs a hub id.")
    elif data.path is not None:
        check.add("data.path", f"data.source={data.source.name} reads no hub id; see data.source.")
    if data.source is not DataSource.hub and data.revision is not None:
        check.add("data.revision", f"data.source={data.source.name} has no revision.")
    for name in _FILE_FIELDS:
        _check_data_file(check, f"data.{name}")
    if data.reader is not None and data.source is not DataSource.jsonl:
        check.add("data.reader", f"data.source={data.source.name} has no files that it could read.")
    elif data.reader is not None:
        check_function(check, "data.reader")
    trained_on = (data.preferences, data.demonstrations, data.prompts)
    if data.source is DataSource.jsonl and not any(trained_on):
        message = (
            "data.source=jsonl needs a .jsonl, .json, .csv or .parquet file, of preferences, "
            "demonstrations or prompts."
        )
        check.add("data.preferences", message)
    for item in fields(data.columns):
        key, column = f"data.columns.{item.name}", getattr(data.columns, item.name)
        if column is not None and data.source not in (DataSource.jsonl, DataSource.hub):
            check.add(key, f"data.source={data.source.name} has no columns of yours.")
        check.require(column is None or bool(column.strip()), key, "must not be empty.")
    if data.source is DataSource.toy:
        _check_toy(check)
    if data.source is DataSource.arithmetic:
        _check_arithmetic(check)
    _check_fractions(check)
    check.at_least(1, "data.limit")
    if data.format is PromptFormat.chat_template and check.config.model.path is None:
        message = "the tokenizer of a model from scratch has no chat template; use hh or plain."
        check.add("data.format", message)


def _check_data_file(check: ConfigChecker, key: str) -> None:
    value = check.value(key)
    if value is None:
        return
    if key == f"data.{CHOSEN}" and check.config.data.chosen_by is not None:
        message = "name the run that made them: best_of:RUN."
        check.require(bool(check.config.data.chosen_by), key, message)
        return
    if check.config.data.source is not DataSource.jsonl:
        check.add(key, "files are read with data=hh_local (data.source=jsonl) only.")
        return
    path = Path(value).expanduser().resolve()
    check.require(path.exists(), key, f"there is no file {path}.")


_SIZES = ("demonstrations", "preferences", "prompts", "validation", "test")


def _check_toy(check: ConfigChecker) -> None:
    check.at_least(1, *(f"data.toy.{size}" for size in _SIZES))
    check.at_least(0, "data.toy.seed")
    noise = check.config.data.toy.label_noise
    check.require(0 <= noise < 0.5, "data.toy.label_noise", "must be in [0, 0.5): labels inform.")


def _check_arithmetic(check: ConfigChecker) -> None:
    check.at_least(1, *(f"data.arithmetic.{size}" for size in _SIZES))
    check.at_least(2, "data.arithmetic.numbers")
    check.at_least(0, "data.arithmetic.seed")
    right = check.config.data.arithmetic.right
    check.require(0 <= right <= 1, "data.arithmetic.right", "must be in [0, 1].")


def _check_fractions(check: ConfigChecker) -> None:
    data = check.config.data
    for name in ("validation_fraction", "test_fraction", "max_bad_fraction"):
        check.require(0 <= getattr(data, name) < 1, f"data.{name}", "must be in [0, 1).")
    if max(data.validation_fraction, data.test_fraction) >= 1:
        return
    if data.validation_fraction + data.test_fraction >= 1:
        message = "leaves nothing to train on: data.validation_fraction + data.test_fraction >= 1."
        check.add("data.test_fraction", message)


def check_training(check: ConfigChecker, stage: str) -> None:
    """Report the problems of the fields that all training stages have.

    Args:
        check: The config, and the problems found in it.
        stage: `sft`, `reward`, `dpo` or `ppo`.
    """
    key = f"{stage}.".__add__
    check.positive(key("lr"), key("grad_norm"), key("lora.alpha"), key("epochs"))
    intervals = ("eval_every", "checkpoint_every", "keep_checkpoints", "keep_every")
    check.at_least(1, *map(key, ("batch", "micro_batch", "steps", "train_blocks", *intervals)))
    check.at_least(0, *map(key, ("seed", "warmup_steps", "weight_decay", "lora.rank")))
    betas = check.value(key("betas"))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        check.add(key("betas"), "needs two numbers in [0, 1), such as [0.9,0.95].")
    batch, micro = check.value(key("batch")), check.value(key("micro_batch"))
    if micro is not None and micro > batch:
        check.add(key("micro_batch"), f"is more than {stage}.batch, {batch} rows.")
    if stage != "ppo":
        _check_steps_or_epochs(check, stage)
    blocks, layers = check.value(key("train_blocks")), layer_count(check.config.model)
    if blocks is not None and layers is not None and blocks > layers:
        check.add(key("train_blocks"), f"the model has {layers} blocks; null trains everything.")
    if blocks is not None and check.value(key("lora.rank")) > 0:
        message = f"choose one: {stage}.train_blocks, or LoRA with {stage}.lora.rank."
        check.add(key("train_blocks"), message)
    if check.value(key("lora.rank")) > 0 and not check.config.plan:
        message = "needs peft: `pip install peft` (extra `lora`)."
        check.require(find_spec("peft") is not None, key("lora.rank"), message)


def _check_steps_or_epochs(check: ConfigChecker, stage: str) -> None:
    steps, epochs = check.value(f"{stage}.steps"), check.value(f"{stage}.epochs")
    if steps is None and epochs is None:
        check.add(f"{stage}.steps", f"set {stage}.steps or {stage}.epochs.")
    if steps is not None and epochs is not None:
        message = f"{stage}.epochs is set too, to {epochs:g}; set one of them to null."
        check.add(f"{stage}.steps", message)


def check_sequence(check: ConfigChecker, stage: str) -> None:
    """Report a sequence length beyond the model's context."""
    length, context = check.value(f"{stage}.seq_length"), context_length(check.config.model)
    check.at_least(2, f"{stage}.seq_length")
    if context is not None and length > context:
        check.add(f"{stage}.seq_length", f"the model's context is {context} tokens.")


def check_ppo(check: ConfigChecker) -> None:
    """Report the problems of PPO's own fields."""
    ppo = check.config.ppo
    check.at_least(1, "ppo.rollouts", "ppo.eval_prompts", "ppo.generation.batch")
    check.at_least(1, "ppo.generation.max_new_tokens", "ppo.kl.horizon")
    check.at_least(0, "ppo.vf_coef", "ppo.entropy_coef", "ppo.kl.coef", "ppo.kl.select_coef")
    check.at_least(0, "ppo.reward.missing_eos_penalty")
    check.positive("ppo.clip_range", "ppo.clip_range_value", "ppo.kl.target", "ppo.kl.stop")
    check.positive("ppo.kl.budget")
    if ppo.kl.budget is not None and ppo.kl.select_coef is not None:
        check.add("ppo.kl.select_coef", "with ppo.kl.budget nothing is subtracted; set one.")
    if ppo.kl.budget is not None and ppo.select is Select.last:
        check.add("ppo.kl.budget", "ppo.select=last takes the last weights; use ppo.select=best.")
    check.positive("ppo.reward.clip", "ppo.generation.temperature")
    for name in ("gamma", "lam"):
        check.require(0 <= getattr(ppo, name) <= 1, f"ppo.{name}", "must be in [0, 1].")
    if ppo.batch > ppo.rollouts:
        message = f"an iteration has only ppo.rollouts={ppo.rollouts} of them."
        check.add("ppo.batch", message)
    if ppo.generation.max_new_tokens >= ppo.seq_length:
        message = f"leaves no room for a prompt in ppo.seq_length={ppo.seq_length}."
        check.add("ppo.generation.max_new_tokens", message)
    if ppo.kl.target is not None and ppo.kl.coef == 0:
        message = "an adaptive controller cannot leave 0; set ppo.kl.target=null for no penalty."
        check.add("ppo.kl.coef", message)
    if ppo.kl.stop is not None and ppo.kl.target is not None and ppo.kl.stop <= ppo.kl.target:
        check.add("ppo.kl.stop", f"must be above the target that KL aims at, {ppo.kl.target:g}.")
    generation = ppo.generation
    if generation.correction not in (None, CORRECTION_AUTO):
        limit = generation.correction_limit
        message = f"is {generation.correction!r}; use auto, null, or a number of at least 1."
        valid = limit is not None and 1.0 <= limit < math.inf
        check.require(valid, "ppo.generation.correction", message)
    _check_advantage(check)
    _check_kl_term(check)
    if ppo.value_trunk is ValueTrunk.branch:
        _check_value_branch(check)
    modelless = not ppo.reward.model_scores and check.config.reward.use is None
    if modelless and ppo.value_init is ValueInit.reward:
        message = f"with a {ppo.reward.kind} there is no reward model; use value_init=small."
        check.add("ppo.value_init", message)


def _check_advantage(check: ConfigChecker) -> None:
    ppo, key = check.config.ppo, "ppo.samples_per_prompt"
    estimator, size = ppo.advantage, ppo.samples_per_prompt
    check.at_least(1, key)
    if size > 1 and ppo.rollouts % size:
        check.add(key, f"must divide ppo.rollouts={ppo.rollouts} into whole groups.")
    if estimator.groups:
        message = f"ppo.advantage={estimator.name} compares the responses to a prompt; use at least"
        check.require(size >= 2, key, f"{message} 2.")
        message = f"ppo.advantage={estimator.name} takes a response's reward as a whole; use 1."
        check.require(ppo.gamma == 1, "ppo.gamma", message)
    if estimator is not AdvantageEstimator.grpo:
        message = "is of ppo.advantage=grpo; leave it out."
        check.require(ppo.grpo_scale is GroupScale.std, "ppo.grpo_scale", message)
    if not ppo.uses_values:
        for name in ("lam", "vf_coef", "clip_range_value", "value_init", "value_trunk"):
            message = f"ppo.advantage={estimator.name} has no value function; leave it out."
            untouched = getattr(ppo, name) == getattr(PpoConfig, name)
            check.require(untouched, f"ppo.{name}", message)


def _check_kl_term(check: ConfigChecker) -> None:
    kl = check.config.ppo.kl
    if kl.unbiased:
        return
    if kl.where is KlPlace.reward:
        message = "is of a penalty in the loss; leave it out, or set ppo.kl.where=loss."
        check.add("ppo.kl.unbiased", message)
    elif kl.estimator is KlEstimator.k1:
        message = "k1's own gradient is 0 on average; use k2 or k3, or ppo.kl.unbiased=true."
        check.add("ppo.kl.estimator", message)


def _check_value_branch(check: ConfigChecker) -> None:
    ppo = check.config.ppo
    if ppo.train_blocks is None or ppo.lora.rank:
        message = "a branch needs a frozen trunk: set ppo.train_blocks, without LoRA, or use own."
        check.add("ppo.value_trunk", message)
    if ppo.value_init is ValueInit.reward:
        message = (
            "the reward model's head reads its own trunk; use value_trunk=own or value_init=small."
        )
        check.add("ppo.value_init", message)


def check_reward_source(check: ConfigChecker) -> None:
    """Report the problems of what scores PPO's responses: function, server or reward model."""
    reward = check.config.ppo.reward
    if reward.function is not None:
        check_reward_function(check, "ppo.reward.function")
    _check_terms(check)
    if reward.function is not None and reward.url is not None:
        check.add("ppo.reward.url", "ppo.reward.function is set too; one of them scores.")
    _check_reward_server(check)
    _check_placement(check)


_TERM_SOURCES = "model, models, function, url or length"


def _check_terms(check: ConfigChecker) -> None:
    reward = check.config.ppo.reward
    for number, term in enumerate(reward.terms):
        key = f"ppo.reward.terms[{number}]"
        singles = (term.model, term.function, term.url, term.length)
        sources = sum(source is not None for source in singles) + bool(term.models)
        if sources != 1:
            message = f"needs exactly one of {_TERM_SOURCES}, and has {sources}."
            check.add(key, message)
            continue
        finite = abs(term.weight) < float("inf")
        check.require(
            finite and term.weight != 0, f"{key}.weight", "must be a number other than 0."
        )
        _check_ensemble(check, key)
        if term.function is not None:
            check_reward_function(check, f"{key}.function")
        if term.url is not None:
            check_address(check, key, "http://127.0.0.1:8480", "ppo.reward.key_env")
        if term.length is not None:
            check.at_least(1, f"{key}.length.target")
        plain = term.name is None or re.fullmatch(r"[\w.-]+", term.name) is not None
        message = "a name in metrics: letters, digits, dots, dashes and underscores."
        check.require(plain or term.url is not None, f"{key}.name", message)
    if reward.terms:
        for name in ("function", "url"):
            message = "ppo.reward.terms is set too; make it one of them."
            check.require(getattr(reward, name) is None, f"ppo.reward.{name}", message)
    ensembles = any(term.models for term in reward.terms)
    check.positive("ppo.reward.ensemble_stop")
    if reward.ensemble_stop is not None and not ensembles:
        message = "no term of ppo.reward.terms has several models, whose scores could disagree."
        check.add("ppo.reward.ensemble_stop", message)


def _check_ensemble(check: ConfigChecker, key: str) -> None:
    """Report an ensemble of one, and settings of an ensemble where there is none."""
    term = check.value(key)
    if term.models:
        several = len(set(term.models)) > 1
        message = "an ensemble needs two different models or more; of one, write model=NAME."
        check.require(several, f"{key}.models", message)
        same = len(set(term.models)) == len(term.models)
        check.require(same or not several, f"{key}.models", "names a model twice.")
    elif term.combine is not Combine.mean:
        check.add(f"{key}.combine", "one model agrees with itself; an ensemble has models=[A,B].")
    check.at_least(0, f"{key}.coef")
    if term.combine is not Combine.uncertainty and term.coef != 1.0:
        check.add(f"{key}.coef", "is of combine=uncertainty.")


def _check_reward_server(check: ConfigChecker) -> None:
    reward = check.config.ppo.reward
    check.at_least(1, "ppo.reward.request_size")
    check.at_least(0, "ppo.reward.retries")
    check.positive("ppo.reward.timeout_s")
    if reward.url is not None:
        check_address(check, "ppo.reward", "http://127.0.0.1:8480")
        blank = reward.name is not None and not reward.name.strip()
        check.require(not blank, "ppo.reward.name", "must not be empty; null names nothing.")
        return
    served = any(term.url is not None for term in reward.terms)
    for name in ("name", "key_env"):
        if getattr(reward, name) is not None and not (served and name == "key_env"):
            check.add(f"ppo.reward.{name}", "is of a reward server; set ppo.reward.url too.")


def _check_placement(check: ConfigChecker) -> None:
    config, key = check.config, "ppo.reward.placement"
    reward = config.ppo.reward
    if reward.gpu is None and reward.placement not in ("shared", "cpu"):
        check.add(key, "expected shared, cpu, or a GPU by its number: gpu:7.")
    elif reward.placement != "shared" and reward.terms:
        check.add(key, "the reward models of ppo.reward.terms are in each process; use shared.")
    elif reward.placement != "shared" and not reward.model_scores:
        message = f"there is no reward model to place, a {reward.kind} scores; use shared."
        check.add(key, message)
    elif reward.gpu == 0:
        # The number of GPUs is known only on the machine where the processes run.
        check.add(key, "the main process trains there; name a GPU that no process has.")


def check_continue_from(check: ConfigChecker) -> None:
    """Report settings under which `ppo.continue_from` cannot extend a run.

    The run itself is not looked at.
    """
    config, key = check.config, "ppo.continue_from"
    if config.ppo.continue_from is None:
        return
    if config.ppo.schedule is not Schedule.constant:
        message = (
            "its learning rate depends on ppo.steps, so a longer run is another from the start; "
            "ppo.continue_from needs ppo.schedule=constant."
        )
        check.add("ppo.schedule", message)
    check.require(config.ppo.use is None, key, "ppo.use is set too, and nothing would train.")
    check.require(config.study.trials is None, key, "a study's trials begin at the beginning.")
