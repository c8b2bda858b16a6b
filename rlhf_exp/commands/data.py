"""`rlhf-exp data FILE` shows how a data file is read, before anything trains on it.

It reads the file as a run does, writes the rows through the tokenizer and prompt format of the
config, and says what was found, what was left out and what is too long.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.commands.runs import composed_points
from rlhf_exp.config.experiment import Config, DataSource
from rlhf_exp.config.training import LossOn
from rlhf_exp.data.files import has_splits, is_saved, read_records
from rlhf_exp.data.layouts import read_rows
from rlhf_exp.data.rows import Corpus, Demonstration, Preference, Prompt, Row, UnusableRow
from rlhf_exp.data.tokenized import (
    RaggedArray,
    tokenize_demonstrations,
    tokenize_preferences,
    tokenize_prompts,
)
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.safe_text import visible
from rlhf_exp.stages.data_module import DataModule, columns_of, reader_of
from rlhf_exp.stages.sft import base_codec

ROLES = ("preferences", "demonstrations", "prompts")
_ROLE_OF: dict[type[Row], str] = {
    Preference: "preferences",
    Demonstration: "demonstrations",
    Prompt: "prompts",
}
_WIDTH = 80
_GLANCE = 100
"""Records that tell what a file may serve as."""
_LINES_SHOWN, _REASONS_SHOWN = 12, 20
_ENDLESS = 2**30
_PERCENTILES = (50, 90, 99, 100)
_CONTEXT, _TRAINED = "|", ">"
"""What a shown line begins with."""


def describe_data(
    source: str | None,
    role: str | None,
    overrides: Sequence[str],
    config_dir: Path | None,
    rows: int,
) -> dict[str, Any]:
    """Return how data are read, as JSON.

    Args:
        source: A file, a folder or a hub id; None: the data of the config.
        role: What the file serves as; None: what its layout gives.
        overrides: As on `launch.py`'s command line.
        config_dir: A further config folder.
        rows: Number of rows to show.

    Raises:
        UserError: Nothing can be read, or the overrides are wrong or a sweep.
    """
    configs = list(composed_points(overrides, config_dir))
    if len(configs) > 1:
        raise UserError("data: the overrides have several values; give one of each")
    config = configs[0]
    allowed = config.data.max_bad_fraction
    if source is not None:
        role = _point_at(config, source, role)
    config.data.max_bad_fraction = 1.0  # all reasons are to be seen
    materials = DataModule(config.data, config.model.path, config.model.revision, report=False)
    corpus = materials.corpus
    codec = base_codec(config.model, materials)
    read = sum(file.read for file in corpus.files)
    return {
        "files": [asdict(file) for file in corpus.files],
        "role": role,
        "prompt_format": config.data.format.value,
        "tokenizer": config.model.path or "trained on these rows",
        "splits": {
            name: {split: len(items) for split, items in getattr(corpus, name).all()}
            for name in ROLES
        },
        "counts": corpus.counts,
        "unusable": [asdict(row) for row in corpus.unusable],
        "unusable_share": len(corpus.unusable) / read if read else 0.0,
        "max_bad_fraction": allowed,
        "warnings": codec.warnings,
        "lengths": _lengths(config, corpus, codec),
        "rows": _shown(config, corpus, codec, role, rows),
    }


def _point_at(config: Config, source: str, role: str | None) -> str | None:
    """Let the config's data be a file, folder or hub id; return what it serves as."""
    data, path = config.data, Path(source).expanduser()
    if path.is_file() or (is_saved(path) and not has_splits(path)):
        if role is None:
            role = _role_of_file(config, path)
        data.source, data.path, data.revision = DataSource.jsonl, None, None
        data.preferences = data.demonstrations = data.prompts = data.test = None
        setattr(data, role, str(path))
        return role
    if role is not None:
        raise UserError(f"{source}: --as is for a file; the rows of a data set are what they are")
    if not path.is_dir() and (path.suffix or len(path.parts) != 2):
        raise UserError(f"{source}: there is no such file or folder, and it is no hub id")
    data.source, data.path = DataSource.hub, str(path) if path.is_dir() else source
    return None


def _role_of_file(config: Config, path: Path) -> str:
    reader = reader_of(config.data)
    records = read_records(path, "data") if reader is None else reader(path, _GLANCE)
    glance = islice(records, _GLANCE)
    kind = read_rows(glance, str(path), None, columns_of(config.data)).gives
    return _ROLE_OF[kind] if kind is not None else ROLES[0]


def _lengths(config: Config, corpus: Corpus, codec: Codec) -> list[dict[str, Any]]:
    """Return the lengths of all rows in tokens, before any is cut, and the limits of the stages."""
    whole = {
        name: _columns(
            name, [row for _, rows in getattr(corpus, name).all() for row in rows], codec, _ENDLESS
        )
        for name in ROLES
    }
    lengths_of = {
        name: {part: ids.lengths() for part, ids in columns.items()}
        for name, columns in whole.items()
    }
    pairs, demonstrations = lengths_of["preferences"], lengths_of["demonstrations"]
    section = config.ppo
    table = [
        (
            "demonstrations",
            "sft.seq_length",
            config.sft.seq_length,
            demonstrations["prompt"] + demonstrations["response"],
        ),
        (
            "pairs, longer side",
            "reward.seq_length",
            config.reward.seq_length,
            pairs["prompt"] + np.maximum(pairs["chosen"], pairs["rejected"]),
        ),
        (
            "prompts",
            "ppo.seq_length - new tokens",
            section.seq_length - section.generation.max_new_tokens,
            lengths_of["prompts"]["prompt"],
        ),
    ]
    return [
        {
            "what": what,
            "limit_of": name,
            "limit": most,
            "percentiles": {
                str(p): int(np.percentile(lengths, p, method="higher")) for p in _PERCENTILES
            },
            "cut": float((lengths > most).mean()),
        }
        for what, name, most, lengths in table
        if len(lengths)
    ]


def _shown(
    config: Config, corpus: Corpus, codec: Codec, role: str | None, number: int
) -> list[dict[str, Any]]:
    """Return the first rows as their stage reads them, cut to its length, part by part."""
    by_role: dict[str, list[Any]] = {
        name: [row for _, rows in getattr(corpus, name).all() for row in rows] for name in ROLES
    }
    name = role or next((name for name in ROLES if by_role[name]), ROLES[0])
    rows = by_role[name][:number]
    seq_length = {
        "preferences": config.reward.seq_length,
        "demonstrations": config.sft.seq_length,
        "prompts": config.ppo.seq_length - config.ppo.generation.max_new_tokens,
    }[name]
    read = _columns(name, rows, codec, seq_length)
    whole = _columns(name, rows, codec, _ENDLESS)
    trained = {"prompt": name == "demonstrations" and config.sft.loss_on is LossOn.all}
    return [
        {
            "origin": row.origin,
            "fields": sorted(row.fields),
            "parts": [
                {
                    "part": part,
                    "trained": trained.get(part, True),
                    "tokens": len(ids[place]),
                    "tokens_uncut": len(whole[part][place]),
                    "text": codec.decode(ids[place].tolist()),
                }
                for part, ids in read.items()
            ],
        }
        for place, row in enumerate(rows)
    ]


def _columns(name: str, rows: list[Any], codec: Codec, seq_length: int) -> dict[str, RaggedArray]:
    """Return the tokens of rows that serve as `name`, part by part."""
    if name == "preferences":
        pairs = tokenize_preferences(rows, codec, seq_length)
        return {"prompt": pairs.prompt, "chosen": pairs.chosen, "rejected": pairs.rejected}
    if name == "demonstrations":
        whole = tokenize_demonstrations(rows, codec, seq_length)
        return {"prompt": whole.prompt_ids, "response": whole.response_ids}
    bare = [replace(row, original=None) for row in rows]
    return {"prompt": tokenize_prompts(bare, codec, seq_length + 1, 1).prompt}


def as_text(data: dict[str, Any]) -> str:
    """Return what `describe_data` found as text of at most 80 columns."""
    lines = [*_file_lines(data), "", *_split_lines(data)]
    if data["counts"]:
        lines += ["", "normalised or not used, numbers of rows:"]
        lines += [
            line for what, n in data["counts"].items() for line in _wrapped(f"{n:>6}  ", what)
        ]
    lines += _unusable_lines(data)
    lines += ["", *_length_lines(data)]
    for warning in data["warnings"]:
        lines += ["", *_wrapped("note: ", warning)]
    if data["rows"]:
        lines += ["", f"rows as the model reads them; {_TRAINED} marks what is trained on:"]
    for row in data["rows"]:
        lines += ["", *_row_lines(row)]
    return "".join(f"{visible(line).rstrip()}\n" for line in lines)


def _file_lines(data: dict[str, Any]) -> Iterable[str]:
    for file in data["files"]:
        yield from _wrapped("", file["name"])
        yield f"  is         {file['kind']}, {file['read']} records"
        layouts = ", ".join(f"{name} ({n})" for name, n in file["layouts"].items())
        yield from _wrapped("  layout     ", layouts or "none")
        yield from _wrapped("  kept       ", ", ".join(file["kept"]) or "no other fields")
        if data["role"]:
            yield f"  serves as  {data['role']} (--as {'|'.join(ROLES)})"
    yield f"written as {data['prompt_format']} (data.format), tokenizer: {data['tokenizer']}"


def _split_lines(data: dict[str, Any]) -> Iterable[str]:
    splits = ("train", "validation", "test")
    yield f"{'rows':16}" + "".join(f"{name:>12}" for name in splits)
    for name, counts in data["splits"].items():
        yield f"{name:16}" + "".join(f"{counts[split]:>12}" for split in splits)


def _unusable_lines(data: dict[str, Any]) -> list[str]:
    unusable = [UnusableRow(**row) for row in data["unusable"]]
    if not unusable:
        return ["", "unusable: none"]
    share, allowed = data["unusable_share"], data["max_bad_fraction"]
    verdict = "a run would stop" if share > allowed else "a run goes on"
    limit = f"data.max_bad_fraction={allowed}"
    lines = ["", f"unusable: {len(unusable)} ({share:.1%}); {verdict} ({limit})"]
    for row in unusable[:_REASONS_SHOWN]:
        lines += _wrapped("  ", f"{row.origin}: {row.reason}", "    ")
    more = len(unusable) - _REASONS_SHOWN
    return [*lines, f"  and {more} more (--json has all)"] if more > 0 else lines


def _length_lines(data: dict[str, Any]) -> Iterable[str]:
    heads = ("median", "90 %", "99 %", "most", "limit")
    yield f"{'tokens of':20}" + "".join(f"{head:>8}" for head in heads) + f"{'cut':>9}"
    for row in data["lengths"]:
        numbers = "".join(f"{row['percentiles'][str(p)]:>8}" for p in _PERCENTILES)
        yield f"{row['what']:20}{numbers}{row['limit']:>8}{row['cut']:>9.1%}"
    yield from _wrapped("limits: ", ", ".join(row["limit_of"] for row in data["lengths"]))


def _row_lines(row: dict[str, Any]) -> Iterable[str]:
    yield from _wrapped("", f"{row['origin']}")
    for part in row["parts"]:
        mark = _TRAINED if part["trained"] else _CONTEXT
        trained = ", trained" if part["trained"] else ""
        cut = part["tokens_uncut"] - part["tokens"]
        of = f" of {part['tokens_uncut']}" if cut else ""
        yield f"  {part['part']}: {part['tokens']}{of} tokens{trained}"
        lines = [
            line
            for paragraph in visible(part["text"]).split("\n")
            for line in textwrap.wrap(
                paragraph, _WIDTH - 4, replace_whitespace=False, drop_whitespace=False
            )
            or [""]
        ]
        yield from (f"  {mark} {line}" for line in lines[:_LINES_SHOWN])
        if len(lines) > _LINES_SHOWN:
            yield f"  {mark} ... {len(lines) - _LINES_SHOWN} more lines (--json has all)"


def _wrapped(first: str, text: str, later: str | None = None) -> list[str]:
    return textwrap.wrap(
        visible(text).replace("\n", " "),
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first) if later is None else later,
        break_on_hyphens=False,
    ) or [first]


def as_json(data: dict[str, Any]) -> str:
    """Return what `describe_data` found as JSON."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
