"""Rules for `eval.judge`."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.config.check_address import check_address
from rlhf_exp.config.eval_judge import EvalJudgeConfig, JudgeName
from rlhf_exp.config.evaluation import PREFERENCE, parts_of
from rlhf_exp.config.problems import Findings

# Fields that only one judge reads; the first is the one that it cannot do without.
_OF = {
    JudgeName.model: ("model", "revision"),
    JudgeName.llm: ("llm", "url", "key_env", "request"),
}


def check_judge(found: Findings) -> None:
    """Report what is wrong with the judges, missing files and keys included."""
    config = found.config
    section = config.eval.judge
    found.at_least(1, *(f"eval.judge.{name}" for name in ("batch", "concurrency", "pairs")))
    found.at_least(0, "eval.judge.retries")
    found.positive("eval.judge.timeout_s")
    found.unless(bool(section.criterion.strip()), "eval.judge.criterion", "must not be empty.")
    _check_names(found, section)
    if JudgeName.llm in section.names:
        _check_endpoint(found, section)
    if section.labels is not None and not Path(section.labels).is_file():
        found.add("eval.judge.labels", "no such file; give a file of judged pairs.")
    if config.eval.samples is not None and section.labels and JudgeName.reward in section.names:
        message = "asks for the reward model, which eval.samples does not load; take `reward` out."
        found.add("eval.judge.names", message)


def _check_names(found: Findings, section: EvalJudgeConfig) -> None:
    names = section.names
    if len(set(names)) < len(names) or not names:
        found.add("eval.judge.names", "names each judge once, and at least one.")
    suite = found.config.eval.suite
    if PREFERENCE not in parts_of(suite) and (section.labels or names != [JudgeName.reward]):
        found.add("eval.judge.names", f"eval={suite.name} compares no answers; see eval.suite.")
    for judge, fields in _OF.items():
        for name in fields:
            key, value = f"eval.judge.{name}", getattr(section, name)
            if judge in names and name == fields[0] and not value:
                found.add(key, f"the judge `{judge.name}` needs it; see eval.judge.names.")
            elif judge not in names and value:
                message = f"the judge `{judge.name}` is not asked; add it to eval.judge.names."
                found.add(key, message)


def _check_endpoint(found: Findings, section: EvalJudgeConfig) -> None:
    check_address(found, "eval.judge", "http://127.0.0.1:8000/v1")
    wrong = [text for text in section.request if not text.partition(":")[1]]
    found.unless(not wrong, "eval.judge.request", "fields are NAME:JSON, such as max_tokens:512.")
