"""Atomic writing, and what libraries say of a full disk: /dev/full is one, for everybody."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import (
    atomic_file,
    disk_full,
    disk_full_is_user_error,
    write_error,
    write_text_atomic,
)

QUOTA = "the disk quota is used up"


def write_python() -> None:
    with open("/dev/full", "w") as file:
        file.write("some text")


def write_torch() -> None:
    with open("/dev/full", "wb") as file:
        torch.save({"weights": torch.zeros(1000)}, file)


def write_numpy() -> None:
    with open("/dev/full", "wb") as file:
        np.save(file, np.zeros(100_000))


def write_safetensors() -> None:
    # Its words on a full disk, as of 0.6. It renames a file of its own over a device.
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("write", [write_python, write_torch, write_numpy, write_safetensors])
def test_a_full_disk_is_said_in_words_whoever_writes(
    write: Callable[[], None], tmp_path: Path
) -> None:
    said = r"^saving: the disk is full at .*: 2\.0 MB needed, .* free on its file system\. Sweep\.$"
    made_later = tmp_path / "not" / "made"
    with (
        pytest.raises(UserError, match=said),
        disk_full_is_user_error(made_later, "saving", 2_000_000, "Sweep."),
    ):
        write()


def test_a_quota_is_no_full_disk_and_other_errors_are_neither() -> None:
    assert (
        disk_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))) == "the disk quota is used up"
    )
    assert disk_full(RuntimeError("I/O error: Disk quota exceeded (os error 122)")) == QUOTA
    assert disk_full(OSError(errno.EACCES, os.strerror(errno.EACCES))) is None
    assert disk_full(RuntimeError("line 28 of the file")) is None


def raised(error: OSError, cause: Exception | None = None) -> Exception:
    """Return an exception as it is caught, with what led to it."""
    if cause is None:
        return error
    cause.__context__ = error
    return cause


def os_error(number: int, path: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if path is None else [str(path)]))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    path = outputs / "reports" / "a.html"
    full = raised(os_error(errno.ENOSPC, path), RuntimeError("unexpected pos 704 vs 598"))
    assert str(write_error(full, outputs)).startswith(f"the disk is full at {path.parent}: ")
    assert str(write_error(full)).endswith("run the same command again: what is done is kept")
    for number in (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EIO):
        said = str(write_error(os_error(number, path), outputs))
        assert said.startswith(f"{path}: cannot be written ({os.strerror(number)})"), said
    assert write_error(os_error(errno.EROFS, path)) is not None


def test_other_errors_are_left_to_whoever_mends_bugs(tmp_path: Path) -> None:
    outside = os_error(errno.EACCES, Path("/etc/shadow"))
    for error in (
        outside,
        os_error(errno.ENOENT, tmp_path / "a"),
        OSError("no number"),
        KeyError(),
    ):
        assert write_error(error, tmp_path) is None
    assert write_error(UserError("No space left on device"), tmp_path) is None


def test_an_error_of_the_user_stays_what_it_is(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^a file called No space left on device$"),
        disk_full_is_user_error(tmp_path, "saving", None, "Sweep."),
    ):
        raise UserError("a file called No space left on device")


def test_a_reader_sees_the_old_content_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old\r\n\u2028")
    with atomic_file(path) as draft:
        draft.write_text("ne")
        assert path.read_bytes().decode() == "old\r\n\u2028"
        draft.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_flushed_before_the_rename_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between leaves the old file or the new, never an empty one."""
    events: list[str] = []
    flush, rename = os.fsync, os.replace

    def noted_flush(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"flush {'folder' if place == tmp_path else 'draft'}")
        flush(descriptor)

    def noted_rename(draft: Path, path: Path) -> None:
        events.append("rename")
        rename(draft, path)

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(Path, "replace", noted_rename)
    write_text_atomic(tmp_path / "a", "text")
    assert events == ["flush draft", "rename", "flush folder"]
