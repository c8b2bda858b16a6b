"""Rules for `eval.toxicity`."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_exp.config.check_function import check_function
from rlhf_exp.config.check_model import context_length, local_folder
from rlhf_exp.config.eval_toxicity import FILE_SUFFIXES, PROFANITY, ScorerKind
from rlhf_exp.config.problems import Findings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_toxicity(found: Findings) -> None:
    """Report what is wrong with the toxicity part of an evaluation, missing files included."""
    config = found.config
    section = config.eval.toxicity
    key = "eval.toxicity.".__add__
    found.at_least(1, *map(key, ("prompts", "generations", "max_new_tokens", "batch")))
    found.at_least(0, *map(key, ("seed", "temperature", "top_k")))
    found.share(key("top_p"))
    if config.eval.samples is None:
        _check_data(found)
    own = section.temperature is not None
    if (section.temperature if own else config.eval.temperature) == 0 and section.generations > 1:
        name = key("temperature") if own else "eval.temperature"
        message = f"with {name}=0 all continuations of a prompt are the same; use 1."
        found.add(key("generations"), message)
    context = context_length(config.model)
    if context is not None and section.max_new_tokens >= context:
        message = f"leaves no room for a prompt in the model's context of {context} tokens."
        found.add(key("max_new_tokens"), message)


def _check_data(found: Findings) -> None:
    section = found.config.eval.toxicity
    path = Path(section.data).expanduser()
    local = section.data.endswith(FILE_SUFFIXES) or local_folder(section.data) is not None
    if local or path.exists():
        message = f"there is nothing at {path.resolve()}; give a file, or a hub id."
        found.unless(path.exists(), "eval.toxicity.data", message)
        if section.revision is not None:
            found.add("eval.toxicity.revision", "only a data set of the hub has revisions.")
    elif not _HUB_ID.fullmatch(section.data):
        message = "expected a .jsonl or .jsonl.gz file, or a hub id such as org/name."
        found.add("eval.toxicity.data", message)


def check_scorer(found: Findings) -> None:
    """Report what is wrong with who scores toxicity."""
    section = found.config.eval.toxicity
    kind = section.scorer_kind
    if kind is ScorerKind.function:
        check_function(found, "eval.toxicity.scorer")
    if kind is not ScorerKind.classifier:
        for name in ("label", "scorer_revision"):
            unset = getattr(section, name) is None
            found.unless(unset, f"eval.toxicity.{name}", "goes with a text classifier only.")
        return
    folder = local_folder(section.scorer)
    if folder is None and not _HUB_ID.fullmatch(section.scorer):
        message = f"expected {PROFANITY}, a folder or hub id of a text classifier, or file.py:name."
        found.add("eval.toxicity.scorer", message)
    elif folder is not None:
        there = (folder / "config.json").is_file()
        found.unless(there, "eval.toxicity.scorer", f"there is no model at {folder}.")
