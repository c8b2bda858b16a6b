"""Checks of `eval`: the suite, the compared models, judges, toxicity and reward quality."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_exp.config.checks_shared import (
    check_address,
    check_function,
    context_length,
    local_folder,
)
from rlhf_exp.config.evaluation import (
    BEST_OF,
    COMPARED,
    FILE_SUFFIXES,
    PEOPLE,
    PREFERENCE,
    PROFANITY,
    REWARD_QUALITY,
    TOXICITY,
    EvalJudgeConfig,
    JudgeName,
    ScorerKind,
    Suite,
    parts_of,
    scores_toxicity,
)
from rlhf_exp.config.experiment import StageName
from rlhf_exp.config.problems import ConfigChecker

# Fields that only one judge reads; the first of each is required.
_FIELDS_OF_JUDGE = {
    JudgeName.model: ("model", "revision"),
    JudgeName.llm: ("llm", "url", "key_env", "request"),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_eval(check: ConfigChecker) -> None:
    """Report the problems of `eval`, except for sections that the suite does not use."""
    config = check.config
    if config.stage is StageName.eval and config.eval.suite is Suite.none:
        check.add("eval.suite", "stage=eval has nothing to do; choose a suite, such as eval=quick.")
    if config.eval.suite is Suite.none:
        return
    check.at_least(1, "eval.prompts", "eval.batch", "eval.max_new_tokens")
    check.at_least(0, "eval.temperature", "eval.top_k", "eval.seed")
    check.fraction("eval.top_p")
    low, high = config.eval.tie_low, config.eval.tie_high
    if not 0 <= low < high <= 1:
        check.add("eval.tie_low", f"needs 0 <= tie_low < tie_high <= 1; tie_high is {high}.")
    context, longest = context_length(config.model), config.eval.max_new_tokens
    if context is not None and longest is not None and longest >= context:
        message = f"leaves no room for a prompt in the model's context of {context} tokens."
        check.add("eval.max_new_tokens", message)
    elif longest is not None:
        _check_room(check, "eval.max_new_tokens")
    elif config.ppo.use is not None:  # else it is reported of PPO's training
        _check_room(check, "ppo.generation.max_new_tokens")
    _check_compared_models(check)
    check_judge(check)
    if TOXICITY in parts_of(config.eval):
        check_toxicity(check)
    if scores_toxicity(config.eval):
        check_scorer(check)
    if REWARD_QUALITY in parts_of(config.eval):
        _check_reward_quality(check)
    if config.eval.best_of:
        _check_best_of(check)
    _check_harness(check)


def _check_room(check: ConfigChecker, key: str) -> None:
    """Report answers so long that an evaluation's rows, as long as PPO's, have no room for prompts.

    Args:
        check: The config, and the problems found in it.
        key: The key of the longest answer.
    """
    room = check.config.ppo.seq_length
    if check.config.eval.samples is None and check.value(key) >= room:
        check.add(key, f"leaves no room for a prompt in ppo.seq_length={room}.")


def _check_compared_models(check: ConfigChecker) -> None:
    config = check.config
    models = config.eval.models
    if len(set(models)) < len(models):
        check.add("eval.models", "names a model twice.")
    parts = parts_of(config.eval)
    # Best-of-n is one more model to compare the baseline with, but not the one that people judge.
    compared = PEOPLE in parts or (PREFERENCE in parts and BEST_OF not in parts)
    least = 2 if compared else 1
    if len(models) < least or not all(models):
        message = f"eval={config.eval.suite.name} needs at least {least}, such as "
        check.add("eval.models", message + f"eval.models=[{','.join(COMPARED)}].")
    if config.eval.samples is not None and config.stage is not StageName.eval:
        check.add("eval.samples", "trains nothing, so it goes with stage=eval only.")


def check_judge(check: ConfigChecker) -> None:
    """Report the problems of `eval.judge`, missing files and API keys included."""
    config = check.config
    section = config.eval.judge
    check.at_least(1, *(f"eval.judge.{name}" for name in ("batch", "concurrency", "pairs")))
    check.at_least(0, "eval.judge.retries")
    check.positive("eval.judge.timeout_s")
    check.require(bool(section.criterion.strip()), "eval.judge.criterion", "must not be empty.")
    _check_judge_names(check, section)
    if JudgeName.llm in section.names:
        _check_endpoint(check, section)
    if section.labels is not None and not Path(section.labels).is_file():
        check.add("eval.judge.labels", "no such file; give a file of judged pairs.")
    if config.ppo.reward.terms and section.labels and JudgeName.reward in section.names:
        message = "a sum of rewards judges answers of this evaluation only; leave `reward` out of "
        check.add("eval.judge.labels", f"{message}eval.judge.names.")
    if config.eval.samples is not None and section.labels and JudgeName.reward in section.names:
        message = "asks for the reward model, which eval.samples does not load; take `reward` out."
        check.add("eval.judge.names", message)


def _check_judge_names(check: ConfigChecker, section: EvalJudgeConfig) -> None:
    names = section.names
    if len(set(names)) < len(names) or not names:
        check.add("eval.judge.names", "names each judge once, and at least one.")
    suite = check.config.eval.suite
    compares = PREFERENCE in parts_of(check.config.eval)
    if not compares and (section.labels or names != [JudgeName.reward]):
        check.add("eval.judge.names", f"eval={suite.name} compares no answers; see eval.suite.")
    for judge, fields in _FIELDS_OF_JUDGE.items():
        for name in fields:
            key, value = f"eval.judge.{name}", getattr(section, name)
            if judge in names and name == fields[0] and not value:
                check.add(key, f"the judge `{judge.name}` needs it; see eval.judge.names.")
            elif judge not in names and value:
                message = f"the judge `{judge.name}` is not asked; add it to eval.judge.names."
                check.add(key, message)


def _check_endpoint(check: ConfigChecker, section: EvalJudgeConfig) -> None:
    check_address(check, "eval.judge", "http://127.0.0.1:8000/v1")
    wrong = [text for text in section.request if not text.partition(":")[1]]
    check.require(not wrong, "eval.judge.request", "fields are NAME:JSON, such as max_tokens:512.")


def check_toxicity(check: ConfigChecker) -> None:
    """Report the problems of sampling and data in `eval.toxicity`, missing files included."""
    config = check.config
    section = config.eval.toxicity
    key = "eval.toxicity.".__add__
    check.at_least(1, *map(key, ("prompts", "generations", "max_new_tokens", "batch")))
    check.at_least(0, *map(key, ("seed", "temperature", "top_k")))
    check.fraction(key("top_p"))
    if config.eval.samples is None:
        _check_toxicity_data(check)
    own = section.temperature is not None
    if (section.temperature if own else config.eval.temperature) == 0 and section.generations > 1:
        name = key("temperature") if own else "eval.temperature"
        message = f"with {name}=0 all continuations of a prompt are the same; use 1."
        check.add(key("generations"), message)
    context = context_length(config.model)
    if context is not None and section.max_new_tokens >= context:
        message = f"leaves no room for a prompt in the model's context of {context} tokens."
        check.add(key("max_new_tokens"), message)
    else:
        _check_room(check, key("max_new_tokens"))


def _check_toxicity_data(check: ConfigChecker) -> None:
    section = check.config.eval.toxicity
    path = Path(section.data).expanduser()
    local = section.data.endswith(FILE_SUFFIXES) or local_folder(section.data) is not None
    if local or path.exists():
        message = f"there is nothing at {path.resolve()}; give a file, or a hub id."
        check.require(path.exists(), "eval.toxicity.data", message)
        if section.revision is not None:
            check.add("eval.toxicity.revision", "only a data set of the hub has revisions.")
    elif not _HUB_ID.fullmatch(section.data):
        message = "expected a .jsonl or .jsonl.gz file, or a hub id such as org/name."
        check.add("eval.toxicity.data", message)


def check_scorer(check: ConfigChecker) -> None:
    """Report the problems of the toxicity scorer."""
    section = check.config.eval.toxicity
    kind = section.scorer_kind
    if kind is ScorerKind.function:
        check_function(check, "eval.toxicity.scorer")
    if kind is not ScorerKind.classifier:
        for name in ("label", "scorer_revision"):
            unset = getattr(section, name) is None
            check.require(unset, f"eval.toxicity.{name}", "goes with a text classifier only.")
        return
    folder = local_folder(section.scorer)
    if folder is None and not _HUB_ID.fullmatch(section.scorer):
        message = f"expected {PROFANITY}, a folder or hub id of a text classifier, or file.py:name."
        check.add("eval.toxicity.scorer", message)
    elif folder is not None:
        exists = (folder / "config.json").is_file()
        check.require(exists, "eval.toxicity.scorer", f"there is no model at {folder}.")


def _check_best_of(check: ConfigChecker) -> None:
    """Report numbers of answers of which none is the best."""
    config, key = check.config, "eval.best_of"
    sizes = config.eval.best_of
    if min(sizes) < 1 or len(set(sizes)) < len(sizes) or max(sizes) < 2:
        message = "names numbers of answers from 1 on, each once, one of them at least 2, such as "
        check.add(key, f"{message}eval.best_of=[1,4,16,64].")
    if config.eval.temperature == 0:
        message = "equal answers have no best one: eval.temperature must be above 0."
        check.add(key, message)


def _check_harness(check: ConfigChecker) -> None:
    """Report tasks of lm-eval that are missing, or that nothing answers."""
    config, key = check.config, "eval.harness.tasks"
    section = config.eval.harness
    check.at_least(1, "eval.harness.limit", "eval.harness.batch")
    check.at_least(0, "eval.harness.few_shot")
    if config.eval.suite is Suite.harness and not section.tasks:
        check.add(key, "names no task; give some, such as eval.harness.tasks=[arc_easy,./my.yaml].")
    if not all(section.tasks) or len(set(section.tasks)) < len(section.tasks):
        check.add(key, "names each task once.")
    elif config.eval.samples is not None and section.tasks:
        check.add(key, "need the models, which eval.samples does not load; leave one of them out.")


def _check_reward_quality(check: ConfigChecker) -> None:
    key = "eval.reward_quality.".__add__
    check.at_least(1, *map(key, ("pairs", "prompts", "best_of")))
    config = check.config
    if config.eval.temperature == 0 and config.eval.reward_quality.best_of > 1:
        message = "equal answers have no best one: eval.temperature must be above 0, or this 1."
        check.add(key("best_of"), message)
    if config.eval.reward_quality.referee is not None and config.eval.samples is not None:
        message = "eval.samples holds the scores of the referee it was made with; leave one out."
        check.add(key("referee"), message)
