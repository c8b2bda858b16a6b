"""What a run's output folder says, as texts that are equal exactly if the results are.

Only output formats are read, never the package: a refactoring can rename all that it likes.
Numbers are compared as they are written: Python writes two floats alike only if they are the same.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Facts = dict[str, dict[str, str]]
"""By kind: what is said of each thing, by its name."""

KINDS = ("stage keys", "parents", "tensors", "metrics", "results", "config", "files")
NEEDED = ("stage keys", "parents", "tensors", "metrics", "results")
"""Kinds of which every run has some."""

# Of the manifest: the moment, the code and the run. Its files are read themselves.
_OF_THE_RUN = ("created", "git", "versions", "wandb_run_id", "code", "files", "duration_s")
_MEASURED = ("time/", "throughput/", "memory/")


def read(outputs: Path) -> Facts:
    """Return what an output folder says.

    Args:
        outputs: The folder of one run; its artifacts are found by their manifests.
    """
    facts: Facts = {kind: {} for kind in KINDS}
    for manifest in sorted(outputs.rglob("manifest.json")):
        _read_artifact(manifest.parent, facts)
    return facts


def _read_artifact(folder: Path, facts: Facts) -> None:
    manifest = _json((folder / "manifest.json").read_text(encoding="utf-8"))
    stage, outputs = manifest["stage"], manifest["config"]["output_dir"]
    facts["stage keys"][stage] = manifest["key"]
    parents = {"parents": manifest.pop("parents"), "inputs": manifest.pop("inputs", {})}
    facts["parents"] |= {f"{stage} {name}": text for name, text in _leaves(parents, outputs)}
    config = _leaves(manifest.pop("config"), outputs)
    facts["config"] |= {f"{stage} {name}": text for name, text in config}
    rest = {name: value for name, value in manifest.items() if name not in _OF_THE_RUN}
    rest = {name: value for name, value in rest.items() if name not in ("stage", "key")}
    facts["results"] |= {f"{stage} manifest {name}": text for name, text in _leaves(rest, outputs)}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = f"{stage}/{path.relative_to(folder).as_posix()}"
        facts["files"][name] = "there"
        if path.name not in ("manifest.json", "run_id"):
            kind, found = _read_file(path, outputs)
            facts[kind] |= {f"{name} {part}".rstrip(): text for part, text in found}


def _read_file(path: Path, outputs: str) -> tuple[str, Iterator[tuple[str, str]]]:
    """Return the kind of what a file says, and each part's name and text."""
    if path.suffix == ".safetensors":
        return "tensors", _tensors(path)
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = {f"row {number}": _json(line) for number, line in enumerate(lines)}
        return "metrics" if path.name == "metrics.jsonl" else "results", _leaves(rows, outputs)
    if path.suffix == ".json":
        return "results", _leaves(_json(path.read_text(encoding="utf-8")), outputs)
    return "results", iter([("", hashlib.sha256(path.read_bytes()).hexdigest())])


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name, and its type, shape and sha256.

    The format: the header's length in 8 bytes, little-endian; the header, JSON; the bytes.
    """
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    body = content[8 + length :]
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        digest = hashlib.sha256(body[first:last]).hexdigest()
        yield name, f"{entry['dtype']}{entry['shape']} {digest}"


class _Number(str):
    """A number as it is written; its `repr` has no quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def _json(text: str) -> Any:
    """Return JSON with its numbers as they are written."""
    return json.loads(text, parse_float=_Number, parse_int=_Number, parse_constant=_Number)


def _leaves(value: Any, outputs: str, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield what is in a JSON value, without what is measured; the output folder has no name."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        if not value:
            yield name, "{}" if isinstance(value, dict) else "[]"
        for part, item in items:
            if not str(part).startswith(_MEASURED):
                yield from _leaves(item, outputs, f"{name}.{part}".lstrip("."))
    else:
        yield name, repr(value).replace(outputs, "OUTPUTS")


def differences(old: Facts, new: Facts) -> dict[str, list[str]]:
    """Return what differs, by kind, in words.

    A key of the config that only the new run has is none: what an option added later does at its
    default, the other kinds show.
    """
    return {
        kind: [
            f"{name}: {old[kind].get(name, 'missing')} -> {new[kind].get(name, 'missing')}"
            for name in [*old[kind], *(name for name in new[kind] if name not in old[kind])]
            if old[kind].get(name) != new[kind].get(name)
            and not (kind == "config" and name not in old[kind])
        ]
        for kind in KINDS
    }
