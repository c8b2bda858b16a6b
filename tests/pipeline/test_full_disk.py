"""A disk that is full at any moment, or read-only: a message, and nothing lost.

Needs root, for file systems of a few hundred kilobytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LAUNCH, ROOT, artifact, small, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def launched(outputs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run `launch.py` in a process of its own."""
    return called(str(LAUNCH), *small(outputs, *overrides))


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_a_run_goes_on_whenever_there_is_room_again(disk: Path, small_run: Path) -> None:
    """Room for 700 kB more each time: no traceback, and in the end the same weights."""
    stops = 0
    for size in range(200, 9000, 700):
        remount(disk, f"size={size}k")
        done = launched(disk / "outputs", "name=small")
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode == 0:
            break
        assert done.returncode == 2, done.stderr
        assert "the disk is full" in done.stderr
        assert "Make room and run" in done.stderr
        stops += 1
    assert done.returncode == 0
    assert stops > 4
    for stage in ("sft", "reward", "ppo"):
        found, whole = artifact(disk / "outputs", stage), artifact(small_run, stage)
        assert weights(found) == weights(whole), stage


def test_what_is_read_only_is_planned_and_shown_or_refused_in_words(
    disk: Path, small_run: Path
) -> None:
    remount(disk, "size=60m")
    outputs = disk / "outputs"
    shutil.copytree(small_run, outputs)
    remount(disk, "ro")
    done = launched(outputs, "name=small", "plan=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cached") == 4
    tool = ("-m", "rlhf_exp.cli", "--outputs", str(outputs))
    for command in (("status",), ("compare", "small", "small"), ("report", "small", "--json")):
        done = called(*tool, *command)
        assert done.returncode == 0, done.stderr
    for command in (("report", "small"), ("store", "gc", "--older-than", "0")):
        done = called(*tool, *command)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in (0, 2)
        assert done.returncode == 0 or "Read-only file system" in done.stderr
    done = launched(outputs, "name=small")
    assert (done.returncode, "Read-only file system" in done.stderr) == (2, True), done.stderr
