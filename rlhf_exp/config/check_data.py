"""Rules for `data`."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.config.data import PromptFormat, Source
from rlhf_exp.config.problems import Findings

_FILES = ("preferences", "demonstrations", "prompts", "test")


def check_data(found: Findings) -> None:
    """Report what is wrong with `data`, missing files included."""
    data = found.config.data
    if data.source is Source.hub:
        found.unless(data.path is not None, "data.path", "data.source=hub needs a hub id.")
    elif data.path is not None:
        found.add("data.path", f"data.source={data.source.name} reads no hub id; see data.source.")
    if data.source is not Source.hub and data.revision is not None:
        found.add("data.revision", f"data.source={data.source.name} has no revision.")
    for name in _FILES:
        _check_file(found, f"data.{name}")
    if data.source is Source.jsonl and data.preferences is None:
        found.add("data.preferences", "data.source=jsonl needs a .jsonl or .jsonl.gz file.")
    if data.source is Source.toy:
        _check_toy(found)
    _check_fractions(found)
    found.at_least(1, "data.limit")
    if data.format is PromptFormat.chat_template and found.config.model.path is None:
        message = "the tokenizer of a model from scratch has no chat template; use hh or plain."
        found.add("data.format", message)


def _check_file(found: Findings, key: str) -> None:
    value = found.value(key)
    if value is None:
        return
    if found.config.data.source is not Source.jsonl:
        found.add(key, "files are read with data=hh_local (data.source=jsonl) only.")
        return
    path = Path(value).expanduser().resolve()
    found.unless(path.is_file(), key, f"there is no file {path}.")


def _check_toy(found: Findings) -> None:
    sizes = ("demonstrations", "preferences", "prompts", "validation", "test")
    found.at_least(1, *(f"data.toy.{size}" for size in sizes))
    found.at_least(0, "data.toy.seed")
    noise = found.config.data.toy.label_noise
    found.unless(0 <= noise < 0.5, "data.toy.label_noise", "must be in [0, 0.5): labels inform.")


def _check_fractions(found: Findings) -> None:
    data = found.config.data
    for name in ("validation_fraction", "test_fraction", "max_bad_fraction"):
        found.unless(0 <= getattr(data, name) < 1, f"data.{name}", "must be in [0, 1).")
    if max(data.validation_fraction, data.test_fraction) >= 1:
        return
    if data.validation_fraction + data.test_fraction >= 1:
        message = "leaves nothing to train on: data.validation_fraction + data.test_fraction >= 1."
        found.add("data.test_fraction", message)
