"""The transaction log of a W&B run, `run-<id>.wandb`: reading, copying, marking as sent.

Offline this file is all that W&B writes: it contains config, history, summary and exit code. Its
layout: a header of 7 bytes, then LevelDB log chunks in blocks of 32 KiB (crc32, length and type
before the data), whose joined data are protobuf `Record`s. wandb's protobufs are private, so this
can break with another wandb; the tests compare it with `wandb leet inspect`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.local import STEP

_BLOCK = 32768
_FILE_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_DATA_DIR = "wandb-data"


@dataclass
class WandbRun:
    """The content of one start's transaction log.

    Attributes:
        run_id: W&B's run id.
        project: Its project.
        entity: Its user or team; "" is the account's default.
        group: Its group, or "".
        job_type: Its job type, or "".
        name: Its display name.
        tags: Its tags.
        config: The config, nested.
        summary: The last summary.
        history: One dict for each `log`, in order.
        exit_code: None when the run was never finished: its process was killed.
        preempting: Whether it was marked as preempted.
    """

    run_id: str = ""
    project: str = ""
    entity: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    preempting: bool = False


def wandb_files(folder: Path) -> list[Path]:
    """Return the transaction logs under a run's folder, one for each start, in order."""
    logs = (folder / "wandb").glob("*run-*/run-*.wandb")
    return sorted(logs, key=lambda path: path.parent.name.removeprefix("offline-"))


def read_wandb_file(path: Path) -> WandbRun:
    """Read one transaction log; of one that a kill cut short, the complete records.

    Raises:
        UserError: It is no transaction log, or is damaged before its end.
    """
    run = WandbRun()
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            start = record.run
            run.run_id, run.project, run.group = start.run_id, start.project, start.run_group
            run.entity = start.entity
            run.job_type, run.name, run.tags = start.job_type, start.display_name, list(start.tags)
            _apply(run.config, start.config)
        elif kind == "config":
            _apply(run.config, record.config)
        elif kind == "summary":
            _apply(run.summary, record.summary)
        elif kind == "history":
            run.history.append(_row(record))
        elif kind == "preempting":
            run.preempting = True
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def joined_history(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the rows of a run over all its starts: one for each `global_step`, in order.

    Rows of one step are merged and the last value counts, so that a step replayed after a resume
    replaces the lost one.
    """
    merged: dict[int, dict[str, Any]] = {}
    for path in paths:
        for row in read_wandb_file(path).history:
            if STEP in row:
                merged.setdefault(row[STEP], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def synced_marker(path: Path) -> Path:
    """Return the file whose presence tells `wandb sync` that a log has been sent."""
    return path.with_name(path.name + ".synced")


def mark_synced(path: Path, note: str = "") -> None:
    """Mark a transaction log as sent; `note` is for this project, wandb does not read it."""
    synced_marker(path).write_text(note)


def is_complete(path: Path) -> bool:
    """Return whether the run was finished and all of its log is on disk."""
    try:
        last = deque(_chunks(path), maxlen=1)
    except (OSError, UserError):  # not even begun
        return False
    return bool(last) and _parse(last[0]).WhichOneof("record_type") == "exit"


def copy_log(
    source: Path, target: Path, keep: Callable[[dict[str, Any]], bool], folder: Path
) -> None:
    """Copy a transaction log with those of its rows for which `keep` returns true.

    Files that wait to be uploaded with an artifact are named by absolute paths, which are wrong
    once a run's folder has been moved: the copy names them below `folder`, the run's folder.
    """
    with open(target, "wb") as file:
        file.write(_FILE_HEADER)
        for record in _records(source):
            kind = record.WhichOneof("record_type")
            if kind == "history" and not keep(_row(record)):
                continue
            if kind == "artifact":
                for entry in record.artifact.manifest.contents:
                    entry.local_path = _moved(entry.local_path, folder)
            _write_record(file, record.SerializeToString())


def _moved(path: str, folder: Path) -> str:
    _, separator, rest = path.rpartition(f"/{_DATA_DIR}/")
    return str(folder / _DATA_DIR / rest) if separator else path


def _write_record(file: BinaryIO, data: bytes) -> None:
    first = True
    while first or data:
        left_in_block = _BLOCK - file.tell() % _BLOCK
        if left_in_block < _CHUNK_HEADER.size:
            file.write(bytes(left_in_block))
            continue
        room = left_in_block - _CHUNK_HEADER.size
        part, data = data[:room], data[room:]
        kind = (_MIDDLE if data else _LAST) if not first else (_FIRST if data else _FULL)
        checksum = zlib.crc32(part, zlib.crc32(bytes([kind])))
        file.write(_CHUNK_HEADER.pack(checksum, len(part), kind) + part)
        first = False


def _records(path: Path) -> Iterator[Any]:
    return map(_parse, _chunks(path))


def _row(record: Any) -> dict[str, Any]:  # noqa: ANN401 - a wandb protobuf
    row: dict[str, Any] = {}
    _set_items(row, record.history.item)
    return row


def _parse(data: bytes) -> Any:  # noqa: ANN401 - a wandb protobuf
    from wandb.proto import wandb_internal_pb2  # private and slow to import: only when reading

    record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    record.ParseFromString(data)
    return record


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the joined data of each record, up to the end of the file or to a torn chunk."""
    content = path.read_bytes()
    position = len(_FILE_HEADER)
    if content[:position] != _FILE_HEADER:
        raise UserError(f"{path}: not a W&B transaction log: it begins with {content[:7]!r}")
    parts: list[bytes] = []
    while position + _CHUNK_HEADER.size <= len(content):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _CHUNK_HEADER.size:  # too little for a header: filled with zeros
            position += left_in_block
            continue
        checksum, length, kind = _CHUNK_HEADER.unpack_from(content, position)
        start = position + _CHUNK_HEADER.size
        position = start + length
        data = content[start:position]
        if len(data) < length or (kind == 0 and length == 0):  # torn, or space set aside
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise UserError(f"{path}: damaged at byte {start - _CHUNK_HEADER.size} (checksum)")
        if kind in (_FULL, _FIRST):
            parts = []
        parts.append(data)
        if kind in (_FULL, _LAST):
            yield b"".join(parts)


def _apply(target: dict[str, Any], change: Any) -> None:  # noqa: ANN401 - a wandb protobuf
    """Apply a config or summary record: keys set and keys removed."""
    _set_items(target, change.update)
    for item in change.remove:
        *parents, last = list(item.nested_key) or [item.key]
        inner = target
        for key in parents:
            inner = inner.get(key, {})
        inner.pop(last, None)


def _set_items(target: dict[str, Any], items: Iterable[Any]) -> None:
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        inner = target
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
