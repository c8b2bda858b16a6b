"""Read a W&B transaction log, `run-<id>.wandb`, without W&B's server or its command line.

Offline this file is all that W&B writes: config, history, summary and exit code are in it. Its
layout: a header of 7 bytes, then LevelDB log chunks in blocks of 32 KiB (crc32, length and type
before the data), whose joined data are protobuf `Record`s. wandb's protobufs are private, so this
can break with another wandb; the tests compare it with `wandb leet inspect`.

Starting a W&B run, offline if the server is away.

Measured with wandb 0.31, and the reason for what looks odd here:
- The transaction log is flushed every 15 s by default, so that a kill in the first seconds leaves
  nothing, not even the config. Every second costs nothing noticeable.
- Even offline, wandb sends telemetry over the network unless error reporting is off.
- The directory of a start is named by the second: another start within it would write over it.
- Without a server, `wandb.init` waits for 90 s by default and then fails.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, Literal

import wandb

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.local import STEP

log = logging.getLogger(__name__)

_BLOCK = 32768
_FILE_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_DATA_DIR = "wandb-data"


@dataclass
class WandbRun:
    """What one start of a run wrote.

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
    """The transaction logs under a run's folder, one for each start, in order of starting."""
    found = (folder / "wandb").glob("*run-*/run-*.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def read_wandb_file(path: Path) -> WandbRun:
    """Read one transaction log; of one that a kill cut short, what is whole.

    Raises:
        UserError: It is no transaction log, or one damaged before its end.
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


def synced_marker(path: Path) -> Path:
    """The file whose presence tells `wandb sync` that a log has been sent."""
    return path.with_name(path.name + ".synced")


def mark_synced(path: Path, note: str = "") -> None:
    """Say that a transaction log has been sent; `note` is ours, wandb reads none."""
    synced_marker(path).write_text(note)


def is_complete(path: Path) -> bool:
    """Whether the run was finished and all of its log is on disk."""
    try:
        last = deque(_chunks(path), maxlen=1)
    except (OSError, UserError):  # not even begun
        return False
    return bool(last) and _parse(last[0]).WhichOneof("record_type") == "exit"


def copy_log(
    source: Path, target: Path, keep: Callable[[dict[str, Any]], bool], folder: Path
) -> None:
    """Copy a transaction log, of its rows only those to `keep`.

    Files that wait to be uploaded with an artifact are named by their absolute paths, which are
    wrong once a run's folder has been moved: they become those below `folder`, the run's folder.
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
    _, found, rest = path.rpartition(f"/{_DATA_DIR}/")
    return str(folder / _DATA_DIR / rest) if found else path


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


def joined_history(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of a run over all its starts: one for each `global_step`, in order.

    Rows of one step are merged and the last value counts, so that a step replayed after a resume
    replaces the lost one.
    """
    merged: dict[int, dict[str, Any]] = {}
    for path in paths:
        for row in read_wandb_file(path).history:
            if STEP in row:
                merged.setdefault(row[STEP], {}).update(row)
    return [merged[step] for step in sorted(merged)]


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
    """The joined data of each record, up to the end of the file or to a torn chunk."""
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


os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported


FLUSH_S = 1.0
START_S = 15.0  # then the run is recorded offline: a server that is away must not hold up training
FINISH_S = 60.0  # a lost server must not hold a finished job; what is unsent can be synced later


def start_run(
    mode: Literal["offline", "online"],
    folder: Path,
    run_id: str,
    *,
    config: Mapping[str, Any],
    **named: Any,  # noqa: ANN401 - what `wandb.init` takes
) -> tuple[wandb.Run, bool]:
    """Start or continue a W&B run; return it and whether it is online.

    Args:
        mode: "online" or "offline". A server that does not answer makes it offline.
        folder: The run's folder; the start makes a directory in `folder/wandb`.
        run_id: The id to create or continue.
        config: The resolved config, nested; enums are recorded by name, paths as text.
        named: Project, group and the like.

    Raises:
        UserError: W&B refused: no key.
    """
    given = dict(
        named,
        dir=folder,
        id=run_id,
        resume="allow",
        reinit="create_new",  # a run that someone else left open is not ours to continue
        config=json.loads(json.dumps(dict(config), default=_plain)),
    )
    _await_free_directory(folder / "wandb", run_id)
    try:
        return wandb.init(mode=mode, settings=_settings(mode), **given), mode == "online"
    except wandb.errors.CommError as error:
        log.warning(
            "tracking=online: W&B could not be reached, so this is recorded offline; "
            "`rlhf-exp sync` sends it later. (%s)",
            str(error).splitlines()[0],
        )
        wandb.teardown()  # else the id is in use, by the attempt
        return wandb.init(mode="offline", settings=_settings("offline"), **given), False
    except wandb.Error as error:
        raise UserError(
            f"tracking=online: W&B did not accept the run: {error} "
            "Log in with `wandb login` (or set WANDB_API_KEY) and check the connection, or "
            "record locally with tracking=offline and send it later."
        ) from error


def _await_free_directory(parent: Path, run_id: str) -> None:
    while any(parent.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
        time.sleep(0.05)


def _plain(value: object) -> str:
    """What JSON does not know, as text."""
    return value.name if isinstance(value, Enum) else str(value)


def _settings(mode: Literal["offline", "online"]) -> wandb.Settings:
    return wandb.Settings(
        x_transaction_log_flush_interval=FLUSH_S,
        init_timeout=START_S,
        finish_timeout=FINISH_S,
        finish_timeout_raises=True,
        console="off",  # a progress bar's redraws would fill the log
        silent=mode == "offline",
        quiet=True,
        symlink=False,  # the folder is moved when it is published, and links would break
    )
