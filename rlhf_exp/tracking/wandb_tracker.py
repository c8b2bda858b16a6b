"""The `Tracker` that writes a Weights & Biases run, online or as local files.

Measured with wandb 0.31, and the reason for what looks odd here:
- W&B drops or renumbers steps that go backwards, as they do after a resume. So `global_step` is a
  metric like any other, the axis of all others, and W&B's own step is not used.
- `finish` returns before the file is complete (7 bytes were seen), and the folder is renamed soon
  after. So the exit record is awaited.
- With the server lost, `log` and `alert` go on; what needs an artifact (table, model) may raise.
- W&B's history is appended to and never corrected. So rows that a resume repeats are not sent
  twice, and rows that are known to have been lost are sent before them.
- The transaction log is flushed every 15 s by default, so that a kill in the first seconds leaves
  nothing, not even the config. Every second costs nothing noticeable.
- W&B's own process may be killed, by a system out of memory: every call then raises, of several
  families, until `teardown`. So the calls are guarded, and W&B is started again.
- Even offline, wandb sends telemetry over the network unless error reporting is off.
- The directory of a start is named by the second: another start within it would write over it.
- Without a server, `wandb.init` waits for 90 s by default and then fails.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from hashlib import md5
from pathlib import Path
from typing import Any, Literal

import numpy as np

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb reads it while it is imported
import wandb

from rlhf_exp.errors import UserError
from rlhf_exp.redaction import redacted, without_secrets
from rlhf_exp.tracking.charts import chart_name, chart_names
from rlhf_exp.tracking.local import METRICS, STEP, note_url, read_metrics
from rlhf_exp.tracking.wandb_log import (
    RUN_VARIABLES,
    StartNote,
    is_complete,
    mark_synced,
    recorded_steps,
    wandb_files,
)

log = logging.getLogger(__name__)

FLUSH_S = 1.0
START_S = 15.0  # after that the run is recorded offline: a lost server must not hold up training
FINISH_S = 60.0  # a lost server must not hold a finished job; the rest can be synced later
WRITTEN_S = 10.0
RESTARTS = 3  # of W&B's own process, in one start of a stage
BINS = 64
DIFF_FILE = "git-diff.patch"  # W&B's own, of the working directory, is called diff.patch


class WandbTracker:
    """One W&B run; its files go to `folder/wandb`, staged artifacts to `folder/wandb-data`.

    A resumed run has the same id. Every start makes its own directory; those written offline are
    joined by the id when they are sent (`wandb_sync.py`).

    Attributes:
        run_id: W&B's run id.
        url: Address of the run's page; None offline.

    Args:
        mode: "online" or "offline". A server that does not answer makes it offline.
        folder: The run's folder.
        run_id: The id to create or continue.
        project: W&B project.
        entity: W&B user or team.
        group: W&B group.
        job_type: W&B job type: the stage, which begins the names of metrics that several log.
        name: W&B display name.
        tags: W&B tags.
        config: The resolved config, nested; enums are recorded by name, paths as text.
        diff: Text of the file `git-diff.patch`; empty: none.
        earlier: Rows from before the resume; online, those that the server lacks are sent,
            offline, those that no earlier start's log holds are recorded again.

    Raises:
        UserError: W&B refuses the run, such as for a missing API key.
    """

    def __init__(
        self,
        mode: Literal["offline", "online"],
        folder: Path,
        *,
        run_id: str,
        project: str,
        entity: str | None,
        group: str | None,
        job_type: str | None,
        name: str | None,
        tags: Sequence[str],
        config: Mapping[str, Any],
        diff: str = "",
        earlier: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self.run_id = run_id
        self._mode: Literal["offline", "online"] = mode
        self._folder, self._diff = folder, diff
        self._stage = job_type
        self._names: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "name": name,
            "tags": list(tags),
            "config": redacted(dict(config)),
        }
        self._data_dir_before = os.environ.get("WANDB_DATA_DIR")
        self._finished = self._lost = False
        self._restarts = 0
        self._open_step: int | None = None  # of a row that is still to be added to
        self._postponed: list[Callable[[], object]] = []
        os.environ["WANDB_DATA_DIR"] = str(folder.resolve() / "wandb-data")
        try:
            self._begin(earlier)
        except BaseException:
            self._restore_environment()
            raise

    def _begin(self, earlier: Sequence[Mapping[str, float]]) -> None:
        """Make a start that first gets the rows that W&B lacks.

        Args:
            earlier: The rows so far. Online, those that the server lacks are sent, offline, those
                that no log holds.
        """
        logs, held = wandb_files(self._folder), recorded_steps(self._folder)
        number = 1 + max([len(logs), *(StartNote.read(log).number for log in logs)])
        self._run, self._online = start_run(self._mode, self._folder, self.run_id, **self._names)
        last = max((row[STEP] for row in earlier), default=-math.inf)
        StartNote(number, last + 1).write(self._log_file())
        self.url = self._run.url if self._online else None  # offline wandb prints a warning
        if self.url is not None:
            note_url(self._folder, self.url)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._sent = self._last_step_sent()
        for row in earlier:
            if row[STEP] > self._sent and (self._online or row[STEP] not in held):
                named = chart_names(self._stage, row)
                self._run.log(_plain_numbers(named), commit=row[STEP] != self._open_step)
        if self._diff:
            path = Path(self._run.dir) / DIFF_FILE
            path.write_text(without_secrets(self._diff), encoding="utf-8", errors="replace")
            self._run.save(str(path), base_path=self._run.dir, policy="now")

    def _log_file(self) -> Path:
        """Return the transaction log of the present start."""
        return Path(self._run.dir).parent / f"run-{self.run_id}.wandb"

    def _record(self, action: Callable[[], object]) -> None:
        """Have W&B record something. It never ends a stage: the local record has everything.

        If its process has ended, W&B is started again, a few times, and gets the rows that it lacks
        from the local record.
        """
        if self._lost:
            return
        try:
            action()
        except Exception as error:  # of the connection to the process, and many of W&B's own
            self._start_again(error)

    def _start_again(self, error: Exception) -> None:
        self._restarts += 1
        why, metrics = _said(error), self._folder / METRICS
        with suppress(Exception):
            wandb.teardown()
        try:
            if self._restarts > RESTARTS:
                raise error
            self._begin(read_metrics(metrics) if metrics.is_file() else [])
        except Exception as again:
            self._lost = True
            log.warning(
                "W&B's own process has ended (%s), as it may if memory runs out, and cannot be "
                "started again (%s). The stage goes on; %s and tables/ beside it have everything. "
                "Rows that W&B lacks are sent from there by `rlhf-exp sync`, or recorded again if "
                "the stage is resumed; its histograms and tables from now on are missing",
                *(why, _said(again), metrics),
            )
            return
        log.warning(
            "W&B's own process has ended (%s), as it may if memory runs out, and was started "
            "again. Its record goes on in a further log, which begins with the rows that it "
            "lacked; at most a histogram and a table of this step are missing. The stage goes on; "
            "%s has everything, and `rlhf-exp sync` sends all logs",
            *(why, metrics),
        )

    def _last_step_sent(self) -> float:
        """Return the last step of a continued run that the server has."""
        if not (self._online and self._run.resumed):
            return -math.inf
        last = self._run.summary.get(STEP)
        return -math.inf if last is None else float(last)

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """See `Tracker`."""
        if step > self._sent:
            row = _plain_numbers({**chart_names(self._stage, metrics), STEP: step})
            self._open_step = step if more else None
            self._record(lambda: self._run.log(row, commit=not more))

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """See `Tracker`. Values that are not finite are left out."""
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if step > self._sent and finite.size:
            histogram = wandb.Histogram(np_histogram=np.histogram(finite, bins=BINS))
            row = {chart_name(self._stage, name): histogram, STEP: step}
            self._open_step = step
            self._record(lambda: self._run.log(row, commit=False))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """See `Tracker`."""

        def build() -> wandb.Table:
            data = [list(row) for row in rows]
            return wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)

        if step > self._sent:
            self._open_step, name = step, chart_name(self._stage, name)
            self._if_server(
                lambda: self._run.log({name: build()}, commit=False),
                # Its row has been sent by then.
                later=lambda: self._run.summary.update({name: build()}),
            )

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        named = chart_names(self._stage, values)
        self._record(lambda: self._run.summary.update(named))

    def alert(self, title: str, text: str, step: int) -> None:
        """See `Tracker`."""
        if step > self._sent:
            self._record(lambda: self._run.alert(title, f"Step {step}: {text}", "WARN"))

    def model(self, name: str, path: Path, final_path: Path, metadata: Mapping[str, Any]) -> None:
        """See `Tracker`. W&B records a file only if it exists, so it is read at `path`."""

        def send() -> None:
            artifact = wandb.Artifact(name, "model", metadata=dict(metadata))
            for entry in artifact.add_reference(path.resolve().as_uri(), checksum=False):
                entry.ref = f"{final_path.resolve().as_uri()}/{entry.path}"
                # Tells versions apart: a model trained again has the same path.
                content = f"{entry.path} {metadata.get('digest')}".encode()
                entry.digest = b64encode(md5(content, usedforsecurity=False).digest()).decode()
            self._run.log_artifact(artifact)

        self._if_server(send, later=send)

    def mark_preempting(self) -> None:
        """See `Tracker`."""
        self._record(self._run.mark_preempting)

    def finish(self, exit_code: int = 0) -> None:
        """See `Tracker`. Waits for the server at most `FINISH_S` seconds."""
        if self._finished:
            return
        self._finished = True
        try:
            for action in self._postponed:
                with suppress(wandb.Error):
                    self._record(action)
            # A second time if its process has ended meanwhile, for the new start.
            restarts = self._restarts
            self._record(lambda: self._finish_run(exit_code))
            if self._restarts > restarts:
                self._record(lambda: self._finish_run(exit_code))
            if not self._lost:
                _await_exit_record(self._log_file())
            # A link to a file in the user's cache, which later runs write to as well.
            for logs in self._folder.glob("wandb/*run-*/logs"):
                (logs / "debug-core.log").unlink(missing_ok=True)
        finally:
            self._restore_environment()

    def _finish_run(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            log.warning("W&B took more than %g s: `rlhf-exp sync` sends the rest", FINISH_S)
            return
        if self._online:
            mark_synced(self._log_file())

    def _if_server(self, action: Callable[[], object], later: Callable[[], object]) -> None:
        """Run `action`, which may need the server; if it is lost, run `later` in `finish`."""

        def run() -> None:
            try:
                action()
            except wandb.Error as error:
                log.warning("W&B: %s; trying again at the end of the run", error)
                self._postponed.append(later)

        self._record(run)

    def _restore_environment(self) -> None:
        if self._data_dir_before is None:
            os.environ.pop("WANDB_DATA_DIR", None)
        else:
            os.environ["WANDB_DATA_DIR"] = self._data_dir_before


def _await_exit_record(path: Path) -> None:
    deadline = time.monotonic() + WRITTEN_S
    while not is_complete(path):
        if time.monotonic() > deadline:
            warnings.warn(f"{path}: W&B did not finish writing it", RuntimeWarning, stacklevel=3)
            return
        time.sleep(0.02)


def start_run(
    mode: Literal["offline", "online"],
    folder: Path,
    run_id: str,
    *,
    config: Mapping[str, Any],
    **names: Any,  # noqa: ANN401 - what `wandb.init` takes
) -> tuple[wandb.Run, bool]:
    """Start or continue a W&B run; return it and whether it is online.

    Args:
        mode: "online" or "offline". A server that does not answer makes it offline.
        folder: The run's folder; the start makes a directory in `folder/wandb`.
        run_id: The id to create or continue.
        config: The resolved config, nested; enums are recorded by name, paths as text.
        names: Project, group and the like.

    Raises:
        UserError: W&B refuses the run, such as for a missing API key.
    """
    arguments = dict(
        names,
        dir=folder,
        id=run_id,
        resume="allow",
        reinit="create_new",  # do not continue a run that other code left open
        config=json.loads(json.dumps(dict(config), default=_plain)),
    )
    try:
        return _initialised(mode, arguments), mode == "online"
    except wandb.errors.CommError as error:
        if mode == "offline":
            raise _no_start(mode, error) from error
        log.warning(
            "tracking=online: W&B could not be reached, so this is recorded offline; "
            "`rlhf-exp sync` sends it later. (%s)",
            str(error).splitlines()[0],
        )
        wandb.teardown()  # else the failed attempt keeps the id in use
        return _initialised("offline", arguments), False
    except wandb.Error as error:
        advice = (
            "Log in with `wandb login` (or set WANDB_API_KEY) and check the connection, or record "
            "locally with tracking=offline and send it later."
            if mode == "online"
            else "tracking=disabled records metrics.jsonl alone."
        )
        raise UserError(f"tracking={mode}: W&B did not accept the run: {error} {advice}") from error


def _initialised(mode: Literal["offline", "online"], arguments: dict[str, Any]) -> wandb.Run:
    """Call `wandb.init`, once more if W&B's own process has ended.

    Raises:
        wandb.Error: W&B refuses the run, or its server does not answer.
        UserError: The process does not start.
    """
    for attempt in (1, 2):
        _await_free_directory(arguments["dir"] / "wandb", arguments["id"])
        try:
            with _own_run():
                return wandb.init(mode=mode, settings=_settings(mode), **arguments)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError, wandb.errors.UsageError):
            raise
        except Exception as error:  # many classes, of W&B's and of the connection to its process
            with suppress(Exception):
                wandb.teardown()  # forgets the process, so that the next call starts another
            if attempt == 2:
                raise _no_start(mode, error) from error
    raise AssertionError("the loop returns or raises")


@contextmanager
def _own_run() -> Iterator[None]:
    """Hide the variables that name another run, such as a W&B agent's."""
    names = RUN_VARIABLES - {"WANDB_DATA_DIR"}  # which this tracker sets
    hidden = {name: os.environ[name] for name in sorted(names) if name in os.environ}
    if hidden.keys() - {"WANDB_MODE"}:
        log.warning("%s: not followed; the config says what is recorded", ", ".join(hidden))
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= hidden


def _no_start(mode: str, error: Exception) -> UserError:
    return UserError(
        f"tracking={mode}: W&B's own process (wandb-core) does not start or was killed "
        f"({_said(error)}), as it may be if memory runs out. The same command tries again; "
        "tracking=disabled records metrics.jsonl alone"
    )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")


def _plain_numbers(row: Mapping[str, float]) -> dict[str, float]:
    return {name: v if isinstance(v, int) else float(v) for name, v in row.items()}


def _await_free_directory(parent: Path, run_id: str) -> None:
    while any(parent.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
        time.sleep(0.05)


def _plain(value: object) -> str:
    """Return a value that JSON cannot hold as text."""
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
