"""Files that outlast a kill and a power cut: the one place for durable writing.

`atomic_file` and its kin write so that a reader sees the old content or the new, whole. Digests are
added by `sealed`. Here too: full disks in the user's words, and sizes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_exp.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
# What a writer that was killed leaves behind; never part of an artifact.
_DRAFT = re.compile(r"\..+\.\d+(\.[0-9a-f]{8})?\.draft")
_OF_LIBRARIES = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # safetensors
# Of renameat2(2), which Python has no function for.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def draft_of(path: Path) -> Path:
    """Return a new name beside `path`, for what is to be renamed to `path` once it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.draft")


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a draft, which becomes `path` when the block has ended.

    A reader sees the old content or the new, whole, whenever the writer dies.

    Args:
        path: the file; its folder must exist.
        durable: also flush file and folder to disk, so that the file survives a power cut.

    Raises:
        OSError: as the file system says (disk full, read-only); no partial file is left.
    """
    draft = draft_of(path)
    try:
        yield draft
        if durable:
            sync(draft)
        draft.replace(path)
    except BaseException:
        # On a file system that has become read-only nothing can be deleted: the first error counts.
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_text_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace the file's content by `text`, in UTF-8 (see `atomic_file`)."""
    with atomic_file(path, durable=durable) as draft:
        draft.write_bytes(text.encode("utf-8"))


def write_json_atomic(path: Path, content: Any, *, durable: bool = True) -> None:  # noqa: ANN401
    """Write `content` as indented JSON, atomically (see `atomic_file`)."""
    write_text_atomic(path, json.dumps(content, indent=1) + "\n", durable=durable)


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths of one file system in one step, so that neither is ever missing.

    Returns:
        False where the system or the file system (NFS) cannot; nothing has happened then.

    Raises:
        OSError: as the file system says; one of them is not there, for example.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # only Linux's C library has it
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(first), None, str(second))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries (names, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; their renames are synchronous.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself, to disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if not path.is_symlink():
                sync(path)
        sync(Path(place))


def files_below(folder: Path, *, links: bool = False) -> Iterator[Path]:
    """Yield the regular files below `folder` in a fixed order; links to files only if asked for."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if path.is_file() and (links or not path.is_symlink()):
                yield path


def drafts_below(folder: Path, *, of_libraries: bool) -> Iterator[Path]:
    """Yield the files and folders that killed writers have left below `folder`.

    Args:
        folder: hidden folders below it are left out.
        of_libraries: also what a library's writer leaves, whose names others may use as well.
    """
    for place, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            if _DRAFT.fullmatch(name) or (of_libraries and _OF_LIBRARIES.fullmatch(name)):
                yield Path(place) / name
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def tree_size(path: Path) -> int:
    """Bytes in the files below `path` (or of `path`); a file that vanishes meanwhile counts 0."""
    total = 0
    for file in [path] if path.is_file() else files_below(path):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def last_change(path: Path) -> float:
    """Newest modification time of `path` and all below it, in seconds since the epoch.

    Now, if something vanishes meanwhile.
    """
    below = (Path(place) / name for place, _, names in os.walk(path) for name in ["", *names])
    newest = 0.0
    for entry in chain([path], below):
        try:
            newest = max(newest, entry.lstat().st_mtime)
        except FileNotFoundError:
            # Somebody works there just now.
            return time.time()
    return newest


def unallocated(folder: Path) -> int:
    """Bytes written below `folder` for which the file system has not yet found room."""
    missing = 0
    for file in files_below(folder):
        status = file.stat()
        missing += max(0, status.st_size - status.st_blocks * 512)
    return missing


def human_size(size: float) -> str:
    """Return a size for people: `813 B`, `1.3 MB`, `12 GB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 9.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# What libraries that are not written in Python, or hide the number, say of a full disk.
_FULL = re.compile(r"No space left on device|os error 28\b|\d+ requested and \d+ written")
_QUOTA = re.compile(r"[Qq]uota exceeded|os error 122\b")


# What else a file system may say of a place where nothing can be written.
_REFUSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG)


def disk_full(error: BaseException) -> str | None:
    """Return in words that an exception comes of a full disk or quota; `None` for any other."""
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number == errno.EDQUOT or _QUOTA.search(str(cause)):
            return "the disk quota is used up"
        if number == errno.ENOSPC or _FULL.search(str(cause)):
            return "the disk is full"
    return None


def write_error(error: BaseException, folder: Path | None = None) -> UserError | None:
    """Return a `UserError` for an exception whose cause is that nothing can be written.

    Args:
        error: any exception; not a `UserError`.
        folder: the output folder. Of paths elsewhere only full disks and read-only file systems
            count: why they cannot be written may be a bug's fault.
    """
    if isinstance(error, UserError):
        return None
    paths = [Path(os.fsdecode(name)) for cause in _causes(error) if (name := _file_name(cause))]
    reason = disk_full(error)
    if reason is not None:
        places = [*(path.parent for path in paths), *([] if folder is None else [folder])]
        at = f" at {places[0]}: {_free(places[0])}" if places else ""
        return UserError(
            f"{reason}{at}. Make room and run the same command again: what is done is kept"
        )
    for cause in _causes(error):
        if not isinstance(cause, OSError):
            continue
        within = folder is not None and any(
            path.absolute().is_relative_to(folder.absolute()) for path in paths
        )
        if cause.errno == errno.EROFS or (cause.errno in _REFUSED and within):
            place = f"{paths[0]}: " if paths else ""
            return UserError(
                f"{place}cannot be written ({cause.strerror}). Make the place writable, or name "
                "another one (output_dir=..., or --outputs of rlhf-exp)"
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _file_name(error: BaseException) -> str | bytes | None:
    name = error.filename if isinstance(error, OSError) else None
    return name if isinstance(name, str | bytes) else None


def _free(folder: Path) -> str:
    free = shutil.disk_usage(existing_folder(folder.absolute())).free
    return f"{human_size(free)} free on its file system"


@contextmanager
def disk_full_is_user_error(
    folder: Path, what: str, needed: int | None, remedy: str
) -> Iterator[None]:
    """Turn a full disk or quota into a `UserError`; every other exception passes.

    Args:
        folder: where is written; names the file system. It need not exist yet.
        what: the work that was being done, such as `publishing ppo 1f3a...`.
        needed: bytes it takes, at least; `None` where nobody knows.
        remedy: the next step for the user, as a sentence.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_full(error)
        if reason is None:
            raise
        place = existing_folder(folder.absolute())
        room = _free(place)
        if needed is not None:
            room = f"{human_size(needed)} needed, {room}"
        raise UserError(f"{what}: {reason} at {place}: {room}. {remedy}") from error


def existing_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return folder if folder.is_dir() else existing_folder(folder.parent)
