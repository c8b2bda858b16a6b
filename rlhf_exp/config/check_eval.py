"""Rules across the fields of `eval`."""

from __future__ import annotations

from rlhf_exp.config.check_judge import check_judge
from rlhf_exp.config.check_model import context_length
from rlhf_exp.config.check_toxicity import check_scorer, check_toxicity
from rlhf_exp.config.evaluation import (
    PREFERENCE,
    REWARD_QUALITY,
    ROLES,
    TOXICITY,
    Suite,
    parts_of,
    scores_toxicity,
)
from rlhf_exp.config.problems import Findings
from rlhf_exp.config.root import Stage


def check_eval(found: Findings) -> None:
    """Report what is wrong with the evaluation."""
    config = found.config
    if config.stage is Stage.eval and config.eval.suite is Suite.none:
        found.add("eval.suite", "stage=eval has nothing to do; choose a suite, such as eval=quick.")
    if config.eval.suite is Suite.none:
        return
    found.at_least(1, "eval.prompts", "eval.batch", "eval.max_new_tokens")
    found.at_least(0, "eval.temperature", "eval.top_k", "eval.seed")
    found.share("eval.top_p")
    low, high = config.eval.tie_low, config.eval.tie_high
    if not 0 <= low < high <= 1:
        found.add("eval.tie_low", f"needs 0 <= tie_low < tie_high <= 1; tie_high is {high}.")
    context, longest = context_length(config.model), config.eval.max_new_tokens
    if context is not None and longest is not None and longest >= context:
        message = f"leaves no room for a prompt in the model's context of {context} tokens."
        found.add("eval.max_new_tokens", message)
    _check_models(found)
    check_judge(found)
    if TOXICITY in parts_of(config.eval.suite):
        check_toxicity(found)
    if scores_toxicity(config.eval.suite):
        check_scorer(found)
    if REWARD_QUALITY in parts_of(config.eval.suite):
        _check_reward_quality(found)


def _check_models(found: Findings) -> None:
    config = found.config
    models = config.eval.models
    if len(set(models)) < len(models):
        found.add("eval.models", "names a model twice.")
    least = 2 if PREFERENCE in parts_of(config.eval.suite) else 1
    if len(models) < least or not all(models):
        message = f"eval={config.eval.suite.name} needs at least {least}, such as "
        found.add("eval.models", message + f"eval.models=[{','.join(ROLES)}].")
    if config.eval.samples is not None and config.stage is not Stage.eval:
        found.add("eval.samples", "trains nothing, so it goes with stage=eval only.")


def _check_reward_quality(found: Findings) -> None:
    key = "eval.reward_quality.".__add__
    found.at_least(1, *map(key, ("pairs", "prompts", "best_of")))
    config = found.config
    if config.eval.temperature == 0 and config.eval.reward_quality.best_of > 1:
        message = "equal answers have no best one: eval.temperature must be above 0, or this 1."
        found.add(key("best_of"), message)
    if config.eval.reward_quality.referee is not None and config.eval.samples is not None:
        message = "eval.samples holds the scores of the referee it was made with; leave one out."
        found.add(key("referee"), message)
