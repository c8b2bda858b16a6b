"""What of data and models will stop a stage, found before the first stage begins.

Each check looks at one subject (the data, the models that are given, the judges), loads no weights
and yields a sentence for each problem. A check may also raise `UserError`, as the loaders that it
shares with the stages do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.config.evaluation import (
    PREFERENCE,
    REFEREE,
    REWARD_QUALITY,
    TOXICITY,
    JudgeName,
    ScorerKind,
    needs_reward,
    parts_of,
    scores_toxicity,
    uses_referee,
)
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import RewardInit, ValueInit
from rlhf_exp.data.parsing import format_dialogue
from rlhf_exp.data.rows import Row, responses_of, reward_fields
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.human_agreement import read_judged_pairs
from rlhf_exp.evaluation.judges.reward_models import check_classifier, rendered_dialogue
from rlhf_exp.function_source import declared_fields
from rlhf_exp.models.inspection import (
    check_weight_files,
    policy_problems,
    vocabulary_problems,
)
from rlhf_exp.models.pretrained import context_of, load_config, load_tokenizer
from rlhf_exp.models.reward_model import reward_model_config
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.stages.evaluation import harness, toxicity


@dataclass(frozen=True)
class Prospect:
    """The stages that are about to run, and what they start from.

    Attributes:
        config: The experiment.
        materials: Its data.
        work: The stages that will run.
        given: Folder or hub id by role, of the models that exist already and that no stage of
            this experiment has made: `base`, `sft`, `reward`, `dpo`, `ppo`, referee, those of
            `eval.models`.
    """

    config: Config
    materials: DataModule
    work: frozenset[str]
    given: Mapping[str, str]

    @property
    def evaluates(self) -> bool:
        """Whether models are evaluated; stored answers need neither models nor prompts."""
        return "eval" in self.work and self.config.eval.samples is None

    @property
    def reward_model_scores(self) -> bool:
        """Whether a reward model scores responses."""
        judged = self.evaluates and needs_reward(self.config.eval)
        scored = bool({"best_of", "ppo"} & self.work)
        return self.config.ppo.reward.model_scores and (scored or judged)


_SCORED = ("reward", "ppo")
"""The stages whose `seq_length` a reward model has to read (`longest_input`)."""

Check = Callable[[Prospect], Iterable[str]]


def readiness_problems(prospect: Prospect, checks: Iterable[Check]) -> list[str]:
    """Return the problems that the checks find, each once."""
    problems: list[str] = []
    for check in checks:
        try:
            problems += check(prospect)
        except UserError as error:
            problems.append(str(error))
    # Two checks may meet the same, one of them knowing more of where.
    return [
        problem
        for number, problem in enumerate(problems)
        if problem not in problems[:number]
        and not any(problem in other for other in problems if other != problem)
    ]


def data_problems(prospect: Prospect) -> Iterator[str]:
    """Yield which rows are missing that a stage needs."""
    config, materials = prospect.config, prospect.materials
    _ = materials.corpus  # no more can be said of data that cannot be read
    needs: list[Callable[[], object]] = []
    if "sft" in prospect.work:
        needs.append(materials.training_demonstrations)
    if "reward" in prospect.work:
        needs.append(lambda: materials.training_pairs("reward", config.reward.part))
    if "dpo" in prospect.work:
        needs.append(lambda: materials.training_pairs("dpo", config.dpo.part))
    if "ppo" in prospect.work:
        needs.append(lambda: materials.training_prompts(config.ppo.reward.delta))
    if "best_of" in prospect.work:
        needs.append(lambda: materials.training_prompts(with_response=False))
    if prospect.evaluates and needs_reward(config.eval):
        needs.append(materials.test_prompts)
    for need in needs:
        yield from _refusal(need)


def policy_model_problems(prospect: Prospect) -> Iterator[str]:
    """Yield why a model that is given cannot be trained or evaluated as a policy."""
    config = prospect.config
    # The stages that read a model's rows; what SFT leaves has its base model's positions.
    readers: dict[str, list[str]] = {}
    trained = [stage for stage in ("sft", "reward", "dpo", "ppo") if stage in prospect.work]
    for stage in trained:
        from_base = stage == "sft" or (stage == "reward" and config.reward.init is RewardInit.base)
        source = "base" if from_base or "sft" in prospect.work else "sft"
        readers.setdefault(source, []).append(stage)
    if "best_of" in prospect.work:
        readers.setdefault("sft", []).append("ppo")  # whose lengths its answers have
    if prospect.evaluates:
        for role in config.eval.models:
            readers.setdefault(role, []).append("ppo")  # whose lengths an evaluation has
    for role, stages in readers.items():
        if role in prospect.given:
            revision = config.model.revision if role == "base" else None
            lengths = {f"{s}.seq_length": int(getattr(config, s).seq_length) for s in stages}
            yield from _model_problems(prospect, role, revision, lengths, policy=True)


def reward_model_problems(prospect: Prospect) -> Iterator[str]:
    """Yield why a reward model that is given cannot score."""
    config, roles = prospect.config, list[str]()
    if prospect.reward_model_scores or config.ppo.value_init is ValueInit.reward:
        roles.append("reward")
    if prospect.evaluates and uses_referee(config.eval):
        roles.append(REFEREE)
    judged = prospect.evaluates and needs_reward(config.eval)
    if {"best_of", "ppo"} & prospect.work or judged:
        roles += config.ppo.reward.term_models
    for role in roles:
        if role in prospect.given:
            lengths = {f"{s}.seq_length": int(getattr(config, s).seq_length) for s in _SCORED}
            yield from _model_problems(prospect, role, None, lengths, policy=False)


def reward_field_problems(prospect: Prospect) -> Iterator[str]:
    """Yield which rows lack a field that a reward function says it needs."""
    reward, corpus = prospect.config.ppo.reward, prospect.materials.corpus
    section, prompts = prospect.config.eval, corpus.prompts
    named = {} if reward.function is None else {"ppo.reward.function": reward.function}
    for number, term in enumerate(reward.terms):
        if term.function is not None:
            named[f"ppo.reward.terms[{number}].function"] = term.function
    rows: list[Row] = []
    if {"best_of", "ppo"} & prospect.work:
        rows += [*prompts.train, *prompts.validation]
    if prospect.evaluates and needs_reward(section):
        rows += prompts.test
    if prospect.evaluates and REWARD_QUALITY in parts_of(section):
        rows += corpus.preferences.test[: section.reward_quality.pairs]
    for key, reference in named.items():
        for name in declared_fields(reference):
            lacking = [row for row in rows if name not in reward_fields(row)]
            if lacking:
                has = ", ".join(reward_fields(lacking[0])) or "none"
                yield (
                    f"{key}={reference} needs the field `{name}` of every prompt's row, and "
                    f"{len(lacking)} of {len(rows)} have none, the first is {lacking[0].origin} "
                    f"(its fields: {has}); give it in the data"
                )


def _model_problems(
    prospect: Prospect,
    role: str,
    revision: str | None,
    lengths: Mapping[str, int],
    *,
    policy: bool,
) -> Iterator[str]:
    """Yield the problems of one model.

    Args:
        prospect: Names the model.
        role: Its role.
        revision: Revision of a hub id.
        lengths: Most tokens of a row that it will read, by the key that says so.
        policy: Whether it writes answers; otherwise it scores them.
    """
    path, option = prospect.given[role], _option(prospect, role)
    try:
        config = load_config(path, revision) if policy else reward_model_config(path, revision)
        check_weight_files(path)
        codec = prospect.materials.codec(path, revision)
    except UserError as error:
        yield f"{option}: {error}"
        return
    problems = list(policy_problems(config)) if policy else []
    problems += _template_problems(prospect, codec)
    problems += vocabulary_problems(config, codec.tokenizer)
    context = context_of(config)
    too_long = {key: length for key, length in lengths.items() if length > (context or length)}
    if too_long:
        problems.append(
            f"its positions end at {context} tokens, and rows of up to {max(too_long.values())} "
            f"are to be read; lower {' and '.join(too_long)} to {context}"
        )
    yield from (f"{option}: {problem}" for problem in problems)


def _template_problems(prospect: Prospect, codec: Codec) -> Iterator[str]:
    """Yield which rows a model's chat template refuses that the policy's has let pass."""
    if codec.prompt_format != "chat_template":
        return
    rows = prospect.materials.rows()
    refused = [
        (row.origin, reason)
        for row in rows
        if (reason := codec.refusal(row.history, responses_of(row))) is not None
    ]
    if refused:
        origin, reason = refused[0]
        yield (
            f"{len(refused)} of {len(rows)} rows cannot be written for it, the first is {origin}: "
            f"{reason}; take these rows out, or give a model whose chat template has room for them"
        )


def _option(prospect: Prospect, role: str) -> str:
    """Return the option that gives the model of a role, as the user wrote it."""
    config = prospect.config
    if role == "base":
        return f"model.path={config.model.path}"
    if role == REFEREE:
        return f"eval.reward_quality.referee={config.eval.reward_quality.referee}"
    if role in ("sft", "reward", "dpo", "ppo"):
        return f"{role}.use={getattr(config, role).use}"
    if role in config.ppo.reward.term_models:
        return f"ppo.reward.terms: {config.ppo.reward.term_models[role]}"
    return f"eval.models: {role}"


def judge_problems(prospect: Prospect) -> Iterator[str]:
    """Yield why a judge of the evaluation cannot judge: a classifier, or a file of votes."""
    config = prospect.config
    section = config.eval.judge
    if "eval" not in prospect.work or PREFERENCE not in parts_of(config.eval):
        return
    if JudgeName.model in section.names and section.model is not None:
        try:
            check_classifier(section.model, section.revision)
            check_weight_files(section.model)
            tokenizer = load_tokenizer(section.model, section.revision)
            judge = load_config(section.model, section.revision)
            yield from (
                f"eval.judge.model={section.model}: {problem}"
                for problem in vocabulary_problems(judge, tokenizer)
            )
            if tokenizer.chat_template and prospect.evaluates:
                for row in prospect.materials.corpus.prompts.test[: config.eval.prompts]:
                    prompt = format_dialogue(row.history)
                    rendered_dialogue(tokenizer, section.model, prompt, row.original or "Yes.")
        except UserError as error:
            yield f"eval.judge.model={section.model}: {error}"
    if section.labels is not None:
        read_judged_pairs(Path(section.labels), "eval.judge.labels", section.question)


def toxicity_problems(prospect: Prospect) -> Iterator[str]:
    """Yield why toxicity cannot be scored: the scorer, or the prompts that are to be continued."""
    config = prospect.config
    usual = config.eval.toxicity.scorer_kind is ScorerKind.profanity
    asks = TOXICITY in parts_of(config.eval)
    if "eval" in prospect.work and (asks or (scores_toxicity(config.eval) and not usual)):
        yield from _refusal(lambda: toxicity.check(config))


def harness_problems(prospect: Prospect) -> Iterator[str]:
    """Yield why tasks of lm-eval cannot be done: the package, a name, a file, or their data."""
    if prospect.evaluates:
        yield from _refusal(lambda: harness.check(prospect.config))


def _refusal(need: Callable[[], object]) -> Iterator[str]:
    """Yield the message of the `UserError` that a call ends with, if it does."""
    try:
        need()
    except UserError as error:
        yield str(error)


CHECKS: tuple[Check, ...] = (
    data_problems,
    policy_model_problems,
    reward_model_problems,
    reward_field_problems,
    judge_problems,
    toxicity_problems,
    harness_problems,
)
"""All checks, in the order in which their problems are reported."""
