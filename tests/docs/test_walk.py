"""A reader who follows a page: each block in order, in one folder, with the smallest sizes.

The folder holds a copy of the project, as a checkout does. Only its experiments are smaller, so
that the commands are those of the page, word for word.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import FOLLOWED, ROOT, Block, blocks

_PARTS = ("rlhf_exp", "conf", "hydra_plugins", "examples")
_SMALLEST = """\
# @package _global_
# The experiment of this name with the smallest sizes.
defaults:
  - override /model: tiny
  - override /data: toy
  - override /tracking: disabled
name: {name}
model: {{architecture: {{layers: 3, width: 32, heads: 2}}}}
data:
  toy: {{demonstrations: 80, preferences: 80, prompts: 80, validation: 16, test: 16}}
sft: {{batch: 8, steps: 4, epochs: null, eval_every: 4, checkpoint_every: 4}}
reward: {{batch: 16, eval_every: 4, checkpoint_every: 4}}
dpo:
  {{batch: 8, steps: 4, epochs: null, eval_prompts: 8, eval_every: 4, checkpoint_every: 4}}
ppo:
  rollouts: 16
  batch: 8
  epochs: 2
  steps: 4
  eval_prompts: 8
  eval_every: 4
  checkpoint_every: 4
  generation: {{max_new_tokens: 8}}
eval: {{prompts: 8}}
"""
_SHIM = '#!/bin/sh\nexec {python} {call} "$@"\n'
_CALL = "-c 'import sys; from rlhf_exp.cli import main; sys.exit(main())'"
_LIMIT_S = 1200
_START_S = 120


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project with small experiments, and `python` and `rlhf-exp` in `bin`."""
    folder = tmp_path / "checkout"
    for part in _PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", folder)
    for name in ("demo", "smoke"):
        file = folder / "conf" / "experiment" / f"{name}.yaml"
        file.write_text(_SMALLEST.format(name=name))
    for name, call in (("python", ""), ("rlhf-exp", _CALL)):
        shim = folder / "bin" / name
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(_SHIM.format(python=sys.executable, call=call))
        shim.chmod(0o755)
    return folder


class Reader:
    """Follows the blocks of one page in a folder."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.server: subprocess.Popen[str] | None = None
        self.ports: dict[str, str] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def follow(self, block: Block) -> None:
        """Run a block; fail with its output if a command fails."""
        if block.file is not None:
            file = self.checkout / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.content)
            return
        if block.language == "python":
            self._run(block, ["python", "-c", block.content])
            return
        for command in block.commands:
            adapted = self._adapted(command)
            if _serves(command):
                self._serve(block, adapted)
            else:
                self._run(block, ["bash", "-c", adapted])

    def _run(self, block: Block, command: list[str]) -> None:
        ended = subprocess.run(
            command,
            cwd=self.checkout,
            env=self.environment,
            input="How do I boil an egg?\n",
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        output = f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
        assert ended.returncode == 0, f"{block.page}:{block.line}: {command[-1]}\n{output}"
        assert "Traceback" not in ended.stderr, f"{block.page}:{block.line}\n{output}"

    def _serve(self, block: Block, command: str) -> None:
        self.stop()
        port = int(re.findall(r"--port (\d+)", command)[-1])
        log = self.checkout / f"server-{port}.log"
        with log.open("w") as file:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.checkout,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        deadline = time.monotonic() + _START_S
        while not _listens(port):
            where = f"{block.page}:{block.line}: {command}\n{log.read_text()[-4000:]}"
            assert self.server.poll() is None, where
            assert time.monotonic() < deadline, where
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server, as Ctrl-C does."""
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            self.server.wait(timeout=60)
            self.server = None

    def _adapted(self, command: str) -> str:
        """Return a command with a port that is free, and a result's key for `KEY`."""
        if command.startswith("rlhf-exp annotate") and _serves(command):
            command += " --port 8470"
        for port in ("8470", "8480"):
            if re.search(rf"\b{port}\b", command):
                free = self.ports.setdefault(port, str(_free_port()))
                command = re.sub(rf"\b{port}\b", free, command)
        if re.search(r"\bKEY\b", command):
            newest = max(
                self.checkout.glob("outputs/store/*/*/manifest.json"), key=os.path.getmtime
            )
            command = re.sub(r"\bKEY\b", newest.parent.name, command)
        return command


def _serves(command: str) -> bool:
    if command.startswith("rlhf-exp serve-reward"):
        return True
    others = ("--results", "--import", "--export")
    return command.startswith("rlhf-exp annotate") and not any(name in command for name in others)


def _listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def reader(checkout: Path) -> Iterator[Reader]:
    made = Reader(checkout)
    yield made
    made.stop()


def _runnable(page: Path) -> list[Block]:
    return [
        block
        for block in blocks(page)
        if (block.language in ("bash", "python") and block.needs is None) or block.file
    ]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "page",
    [page for page in FOLLOWED if _runnable(page)],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_a_reader_can_follow(page: Path, reader: Reader) -> None:
    for block in _runnable(page):
        reader.follow(block)
