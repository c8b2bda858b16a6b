"""Run records: the keys that a run or a sweep's point came to, under the name the user gave it.

`<folder>/<name>/<final key>.json`, one file a point; the same name again adds to it. Reports,
comparisons and `status` read these and the store, and nothing else. A record also names the process
that works on the run, so that others can tell whether it still does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from rlhf_exp.errors import UserError
from rlhf_exp.redaction import redacted
from rlhf_exp.store.artifact import MANIFEST, Manifest, now
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.lease import namespace
from rlhf_exp.store.store import Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Status(StrEnum):
    """How far a run is."""

    running = "running"
    done = "done"
    failed = "failed"
    pruned = "pruned"
    interrupted = "interrupted"
    requeued = "requeued"


@dataclass(frozen=True)
class RunRecord:
    """One run: a point of a sweep, or a single one.

    Attributes:
        name: the name that the user gave it; a folder name.
        stage: the stage that was asked for (`pipeline` for all).
        keys: the key of each stage, in the order they run; the last is the final key.
        overrides: the command line, as given.
        seed: its seed.
        created: ISO 8601 time in UTC.
        objective: the number that a sweep optimises.
        status: how far it is.
        error: the error that ended it, for a failed one.
        log: file with its output, for a failed one that had its own.
        process: who works on it, or did.
    """

    name: str
    stage: str
    keys: dict[str, str]
    overrides: tuple[str, ...] = ()
    seed: int | None = None
    created: str = field(default_factory=now)
    objective: float | None = None
    status: Status = Status.done
    error: str | None = None
    log: str | None = None
    process: Process | None = None

    @property
    def key(self) -> str:
        """The final key."""
        return list(self.keys.values())[-1]

    @property
    def abandoned(self) -> bool:
        """Whether it says that it runs, and its process was killed."""
        return self.status is Status.running and self.process is not None and self.process.gone

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {**dataclasses.asdict(self), "overrides": list(self.overrides)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Read the output of `to_json`; fields of a later version are left out."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        keys = values["keys"]
        if not isinstance(keys, dict) or not keys or not all(map(_is_text, keys.values())):
            raise TypeError(f"keys is {keys!r}, expected the key of each stage")
        if not all(map(_is_text, (values["name"], values.get("created", "")))):
            raise TypeError("name and created are not texts")
        values["overrides"] = tuple(map(str, values.get("overrides", ())))
        values["status"] = Status(values.get("status", Status.done))
        if values.get("process"):
            values["process"] = Process(**values["process"])
        return cls(**values)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _order(record: RunRecord) -> tuple[str, str, str]:
    return record.created, record.name, record.key


def check_name(name: str) -> None:
    """Raise a `UserError` unless `name` can name a folder."""
    if not NAME.fullmatch(name) or name == "latest":
        raise UserError(
            f"name={name!r}: not usable as a name; expected letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, at most 100, and not 'latest'"
        )


class Records:
    """The run records below one folder."""

    def __init__(self, root: Path) -> None:
        """Use `root` (`outputs/sweeps`); it is created when something is written."""
        self.root = Path(root).absolute()

    def write(self, record: RunRecord) -> Path:
        """Write a record, replacing that of the same name and final key."""
        check_name(record.name)
        path = self.root / record.name / f"{record.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, redacted(record.to_json()))
        return path

    def names(self) -> list[str]:
        """Return the names in use, sorted."""
        return sorted({path.parent.name for path in self.root.glob("*/*.json")})

    def all(self) -> list[RunRecord]:
        """Return every record, the oldest first."""
        return self._read(self.root.glob("*/*.json"))

    def sweep(self, name: str) -> list[RunRecord]:
        """Return the records of one name, the oldest first."""
        return self._read((self.root / name).glob("*.json"))

    def resolve(self, run: str, store: Store | None = None) -> RunRecord:
        """Return the one run that `run` means.

        Args:
            run: `latest`, a name, `name/key`, a folder, or the beginning of a key.
            store: where keys and artifact folders without a record are looked for.

        Raises:
            UserError: nothing fits (near names are listed), or several runs do (they are listed).
        """
        records = self.resolve_all(run, store)
        if len(records) == 1 or run == "latest":
            return records[-1]
        points = "\n".join(
            f"  {record.name}/{record.key}  {' '.join(record.overrides)}".rstrip()
            for record in records[:20]
        )
        raise UserError(f"{run!r} fits {len(records)} runs; name one of them:\n{points}")

    def resolve_all(self, run: str, store: Store | None = None) -> list[RunRecord]:
        """Return all the runs that `run` means: of a name, every point (see `resolve`)."""
        for records in (
            self._latest(run),
            self._named(run),
            self._in_folder(run),
            self._with_key(run, store),
        ):
            if records:
                return records
        raise UserError(self._unknown(run))

    def _latest(self, run: str) -> list[RunRecord]:
        records = self.all() if run == "latest" else []
        return [record for record in records if record.name == records[-1].name]

    def _named(self, run: str) -> list[RunRecord]:
        name, _, key = run.partition("/")
        if not NAME.fullmatch(name):
            return []
        return [record for record in self.sweep(name) if record.key.startswith(key)]

    def _in_folder(self, run: str) -> list[RunRecord]:
        folder = Path(run)
        if not run or not folder.is_dir():
            return []
        if (folder / MANIFEST).is_file():
            return [self._of_manifest(Manifest.read(folder))]
        if folder.resolve().parent == self.root.resolve():
            return self.sweep(folder.name)
        # A sweep's folder copied from elsewhere, or any other: only what is a record counts.
        records = []
        for path in folder.glob("*.json"):
            with suppress(UserError):
                records.extend(self._read([path]))
        return sorted(records, key=_order)

    def _with_key(self, run: str, store: Store | None) -> list[RunRecord]:
        stage, slash, start = run.rpartition("/")
        if not start:
            return []
        records = self.all()
        final = [record for record in records if record.key.startswith(start) and not slash]
        if final:
            return final
        artifacts = [] if store is None else store.find(f"{stage}{slash}{start}")
        return [self._of_manifest(artifact.manifest) for artifact in artifacts]

    def _of_manifest(self, manifest: Manifest) -> RunRecord:
        """Return the record with this final key, or one made from the manifest."""
        for record in reversed(self.all()):
            if record.key == manifest.key:
                return record
        return RunRecord(
            name=manifest.key,
            stage=manifest.stage,
            keys={**manifest.parents, manifest.stage: manifest.key},
            created=manifest.created,
            objective=manifest.objective,
        )

    def _read(self, paths: Iterable[Path]) -> list[RunRecord]:
        records = []
        for path in paths:
            try:
                records.append(RunRecord.from_json(json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{path}: not a readable run record ({error}); delete the file, or run the "
                    "same command again to write it anew"
                ) from error
        return sorted(records, key=_order)

    def _unknown(self, run: str) -> str:
        names = self.names()
        near = get_close_matches(run, names, n=5, cutoff=0.5) or names[-5:]
        known = f"names near it: {', '.join(near)}" if near else "no run is recorded yet"
        return (
            f"no run {run!r} in {self.root}; expected `latest`, a name, the beginning of a key, or "
            f"a folder; {known}"
        )


@dataclass(frozen=True)
class Process:
    """A process, told from all others of all machines.

    Attributes:
        host: Name of its machine.
        pid: Its number there.
        namespace: Tells apart processes of containers on one host.
        started: When it was started, in the kernel's clock ticks: numbers are used again.
    """

    host: str
    pid: int
    namespace: str
    started: str

    @classmethod
    def current(cls) -> Self:
        """Return this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, namespace(), _started(pid))

    @property
    def gone(self) -> bool:
        """Whether it has ended; of other machines' and containers' processes nobody knows."""
        if (self.host, self.namespace) != (socket.gethostname(), namespace()):
            return False
        with suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
        return _started(self.pid) != self.started


def _started(pid: int) -> str:
    """Return when a process was started; nothing where the kernel does not say."""
    with suppress(OSError):
        # The name, in parentheses, may hold anything; the start is the 20th value after it.
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A process that has ended, and whose parent has not asked for its exit code yet.
        return "" if values[0] == "Z" else values[19]
    return ""
