"""The transaction log of a W&B run, `run-<id>.wandb`: reading, copying, marking as sent.

Offline this file is all that W&B writes: it contains config, history, summary and exit code. Its
layout: a header of 7 bytes, then LevelDB log chunks in blocks of 32 KiB (crc32, length and type
before the data), whose joined data are protobuf `Record`s. wandb's protobufs are private, so this
can break with another wandb; the tests compare it with `wandb leet inspect`.

*Why not by W&B's public API*, which could replay `metrics.jsonl` and `tables/` into a run when it
is sent: the run would lose what only the log has. These are the time of each row (charts over wall
time, the run's beginning and its duration would be those of the sending), the system metrics that
W&B records itself (GPU, memory, network), histograms, references to model artifacts, and the files
of a start. Reading could go through `wandb leet inspect`, a process of 0.8 s a log; sending would
still have to write logs with chosen rows, for `wandb sync` knows whole logs only, and would send
the rows that a resume repeats twice.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.charts import chart_names
from rlhf_exp.tracking.local import STEP

_BLOCK = 32768
_FILE_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_DATA_DIR = "wandb-data"
_NOTE = "start.json"
RUN_VARIABLES = frozenset(
    f"WANDB_{name}"
    for name in (
        *("CONFIG_PATHS", "DATA_DIR", "DIR", "DISABLED", "IGNORE_GLOBS", "JOB_TYPE", "MODE"),
        *("NAME", "NOTES", "PROJECT", "RESUME", "RUN_GROUP", "RUN_ID", "SWEEP_ID"),
        *("SWEEP_PARAM_PATH", "TAGS"),
    )
)
"""Variables that name a run, which a W&B agent sets: with a sweep's, they outrank arguments."""
_OF_THE_RUN = ("header", "run", "config", "metric", "summary", "telemetry")


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


@dataclass(frozen=True)
class StartNote:
    """What we note of a start, beside its log.

    Attributes:
        number: 1 for the run's first start, then 2 and so on: clocks go back, and W&B names the
            directories of starts by the local time.
        first: the first step that this start runs itself. What earlier starts logged from it on is
            void; earlier steps in this start's log are those that no log held.
    """

    number: int = 0
    first: float | None = None

    @classmethod
    def read(cls, log: Path) -> StartNote:
        """Return the note beside a log; an empty one for starts of earlier versions."""
        try:
            content = json.loads((log.parent / _NOTE).read_text(encoding="utf-8"))
            return cls(int(content["number"]), float(content["first"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, log: Path) -> None:
        """Write the note beside a log."""
        (log.parent / _NOTE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def wandb_files(folder: Path) -> list[Path]:
    """Return the transaction logs under a run's folder, one for each start, in order."""
    logs = (folder / "wandb").glob("*run-*/run-*.wandb")
    return sorted(
        logs,
        key=lambda path: (
            StartNote.read(path).number,
            path.parent.name.removeprefix("offline-"),
        ),
    )


def recorded_steps(folder: Path) -> set[int]:
    """Return the steps of all rows in a run's logs; of a damaged log, those before the damage."""
    steps = set()
    for path in wandb_files(folder):
        with suppress(UserError, OSError):
            for record in _records(path):
                if record.WhichOneof("record_type") == "history":
                    steps.add(_row(record).get(STEP, -1))
    return steps


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


def copy_rows(source: Path, target: Path, rows: Iterable[Mapping[str, float]]) -> None:
    """Write a transaction log of the run in `source` with other rows than its own.

    Args:
        source: the log of a start; its run, config and summary are taken over.
        target: the new log.
        rows: the rows, each with its `global_step`, as `metrics.jsonl` has them.
    """
    from wandb.proto import wandb_internal_pb2

    stage = read_wandb_file(source).job_type or None
    number = position = 0
    exit_record = None
    with open(target, "wb") as file:
        file.write(_FILE_HEADER)
        for record in _records(source):
            kind = record.WhichOneof("record_type")
            number = max(number, record.num)
            if kind == "history":
                position = max(position, record.history.step.num + 1)
            elif kind == "exit":
                exit_record = record
            elif kind in _OF_THE_RUN:
                _write_record(file, record.SerializeToString())
        for row in rows:
            number += 1
            added = wandb_internal_pb2.Record(num=number)  # type: ignore[attr-defined]
            for name, value in {**chart_names(stage, row), "_step": position}.items():
                item = added.history.item.add(value_json=json.dumps(value))
                item.nested_key.append(name)
            added.history.step.num = position
            position += 1
            _write_record(file, added.SerializeToString())
        if exit_record is not None:
            exit_record.num = number + 1
            _write_record(file, exit_record.SerializeToString())


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
