"""The study that all workers share: one append-only file, on a file system that all of them see.

No server, and no SQLite, whose locks fail on network file systems. Writers take turns by a lock
file that is made with O_EXCL, which NFS since version 3, Lustre, GPFS and local file systems do
atomically. Optuna's other lock, a symbolic link, is for NFS version 2, and judges a dead holder by
the journal's age instead of the lock's. A lock that a killed writer leaves is broken after 30 s.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages.journal import JournalFileOpenLock

NAME = "ppo"
_FILE = "journal.log"
_GRACE_S = 30


@dataclass(frozen=True)
class Pruning:
    """When a trial is given up; plain values, which cross processes.

    Attributes:
        rule: `median`, `asha`, `hyperband` or `none`.
        after: Complete trials that the median rule waits for.
        warmup: Evaluations of a trial before it can be pruned, the one before training aside.
        evaluations: Evaluations of a whole trial, the one before training aside.
    """

    rule: str
    after: int
    warmup: int
    evaluations: int


def open_study(
    folder: Path, pruning: Pruning | None = None, sampler: BaseSampler | None = None
) -> Study:
    """Open the study in a folder, or make it.

    Args:
        folder: On a file system that all workers share.
        pruning: When trials are given up.
        sampler: What is tried next.

    Raises:
        UserError: Optuna is missing, or the journal is damaged.
    """
    optuna = imported()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    lock = JournalFileOpenLock(str(path), grace_period=_GRACE_S)
    _mend(path, lock)
    try:
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except ValueError as error:
        raise UserError(
            f"{path}: not a readable study ({error}); move the folder away, or use another name"
        ) from error
    return optuna.create_study(
        storage=storage,
        sampler=sampler or optuna.samplers.RandomSampler(seed=0),
        pruner=pruner_of(pruning),
        study_name=NAME,
        direction="maximize",
        load_if_exists=True,
    )


def exists(folder: Path) -> bool:
    """Whether there is a study in a folder."""
    return (folder / _FILE).is_file()


def imported():  # type: ignore[no-untyped-def] # noqa: ANN201 - the module
    """Return Optuna, told to be quiet.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a study needs Optuna, which is not installed: pip install 'rlhf-exp[sweeps]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def pruner_of(pruning: Pruning | None) -> BasePruner:
    """Return Optuna's pruner."""
    from optuna import pruners

    if pruning is None or pruning.rule == "none":
        return pruners.NopPruner()
    first = pruning.warmup + 1
    if pruning.rule == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=first)
    if pruning.rule == "hyperband":
        return pruners.HyperbandPruner(first, max_resource=max(first, pruning.evaluations))
    return pruners.MedianPruner(n_startup_trials=pruning.after, n_warmup_steps=first)


def _mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Remove a last line that a writer did not finish: nothing could be read after it any more."""
    if not path.exists():
        return
    from optuna.storages.journal._file import get_lock_file

    with path.open("rb") as file:
        if _whole(file.read()):
            return
    with get_lock_file(lock), path.open("r+b") as file:
        content = file.read()
        if not _whole(content):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
            os.fsync(file.fileno())


def _whole(content: bytes) -> bool:
    return not content or content.endswith(b"\n")
