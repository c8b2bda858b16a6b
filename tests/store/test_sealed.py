"""Damage of every kind is told from data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.sealed import (
    DIGESTS,
    Damaged,
    check_sealed_file,
    check_sealed_folder,
    seal_file,
    seal_folder,
    seal_values,
    sealed_values,
)

Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "garbage": lambda path: path.write_bytes(b"\x80\x04N."),
    "another type": lambda path: path.write_text("[]"),
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scores.npy"
    with seal_file(path) as draft:
        draft.write_bytes(b"0123456789")
    return path


def test_a_sealed_file_is_what_sha256sum_checks(file: Path) -> None:
    check_sealed_file(file)
    done = subprocess.run(["sha256sum", "-c", f"{file.name}.sha256"], cwd=file.parent, check=False)
    assert done.returncode == 0
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}.sha256"]


@damages
def test_a_damaged_file_is_named(file: Path, damage: Damage) -> None:
    damage(file)
    with pytest.raises(Damaged, match=r"scores\.npy: \d+ bytes, which do not match"):
        check_sealed_file(file)


@pytest.mark.parametrize("damage", ["empty", "garbage", "another type"])
def test_a_damaged_digest_is_damage(file: Path, damage: str) -> None:
    DAMAGES[damage](file.with_name("scores.npy.sha256"))
    with pytest.raises(Damaged, match=r"scores\.npy: "):
        check_sealed_file(file)


def test_a_missing_file_and_a_missing_digest(file: Path) -> None:
    file.with_name("scores.npy.sha256").unlink()
    with pytest.raises(Damaged, match=r"scores\.npy: its digest cannot be read"):
        check_sealed_file(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"scores\.npy"):
        check_sealed_file(file)


def test_a_writer_that_fails_leaves_the_old_content(file: Path) -> None:
    def write() -> None:
        with seal_file(file) as draft:
            draft.write_bytes(b"01234")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write()
    check_sealed_file(file)
    assert file.read_bytes() == b"0123456789"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_text("some text")
    (tmp_path / "b.json").write_text("{}")
    seal_folder(tmp_path)
    return tmp_path


@damages
@pytest.mark.parametrize("name", ["a", "b.json", DIGESTS])
def test_a_damaged_folder_names_the_file(folder: Path, damage: Damage, name: str) -> None:
    assert set(check_sealed_folder(folder)) == {"a", "b.json"}
    damage(folder / name)
    with pytest.raises(Damaged, match=str(folder)):
        check_sealed_folder(folder)


def test_a_file_that_is_missing_from_a_folder_is_named(folder: Path) -> None:
    (folder / "a").unlink()
    with pytest.raises(Damaged, match=r"a: missing"):
        check_sealed_folder(folder)
    (folder / DIGESTS).unlink()
    with pytest.raises(FileNotFoundError, match=DIGESTS):
        check_sealed_folder(folder)


@pytest.mark.parametrize(
    "content",
    [{}, {"a": 1}, {"a": "0" * 63}, {"../x": "0" * 64}, {"missing": "0" * 64}],
    ids=["none", "number", "short", "elsewhere", "missing"],
)
def test_digests_that_are_none(folder: Path, content: object) -> None:
    (folder / DIGESTS).write_text(json.dumps(content))
    with pytest.raises(Damaged):
        check_sealed_folder(folder)


@damages
def test_values_come_back_or_are_damaged(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "notes.json"
    values = {"b": [1, 2.5, None], "a": {"é": "\u2028"}}
    write_json_atomic(path, seal_values(values))
    assert sealed_values(path) == values
    damage(path)
    with pytest.raises(Damaged, match=r"notes\.json"):
        sealed_values(path)
