"""Runs a Dockerfile's steps without a container: each absolute path lies below a folder instead.

    python -m tests.dockerfile ROOT [NAME=VALUE ...]     # from an empty ROOT, with build arguments

Understands what our Dockerfile uses. Every stage has the same ROOT, so that a COPY from another
stage has nothing to do; base images are the machine, with its `python` of at least 3.11.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("/opt/rlhf-exp", "/src", "/work", "/cache")
"""The absolute paths that the steps use; a test fails if there is another one."""


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, its arguments) of a Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    split = (line.split(maxsplit=1) for line in lines if line.strip())
    return [(name, rest.strip()) for name, rest in split]


def sent(folder: Path) -> list[Path]:
    """Return the files of the build context by `.dockerignore`, relative to its folder."""
    rules = [line for line in (folder / ".dockerignore").read_text().splitlines() if line]
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    dropped = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    files = []
    for name in sorted(kept):
        top = folder / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            parts = path.relative_to(folder).parts
            hidden = any(fnmatch.fnmatch(part, rule) for part in parts for rule in dropped)
            if path.is_file() and not hidden:
                files.append(path.relative_to(folder))
    return files


@dataclass
class Image:
    """What the steps have made so far.

    Attributes:
        root: The folder that stands for `/`.
        environment: The variables of the last stage.
        entrypoint: Its command.
        command: The arguments of the command, unless others are given.
        user: The user and group that it runs as, by number.
        folder: The folder where it starts.
    """

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    user: str = ""
    folder: Path = Path("/")

    def placed(self, text: str) -> str:
        """Return a text with its absolute paths below the root."""
        for place in PLACES:
            text = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w-])", f"{self.root}{place}", text)
        return text

    def run(self, arguments: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run the entry point with arguments, or with the image's own."""
        command = [*self.entrypoint, *(arguments or self.command)]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )


def build(
    root: Path,
    arguments: Mapping[str, str],
    variables: Mapping[str, str],
    after: Callable[[str], None] = lambda step: None,
) -> Image:
    """Run the steps of the Dockerfile.

    Args:
        root: An empty folder.
        arguments: Build arguments.
        variables: Environment variables of the machine that the steps see.
        after: Called with each RUN step when it is done.

    Raises:
        subprocess.CalledProcessError: A step failed.
    """
    shim = root / "bin"
    shim.mkdir(parents=True)
    (shim / "python").symlink_to(sys.executable)
    machine = {**variables, "PATH": f"{shim}:{os.environ['PATH']}"}
    files = sent(ROOT)
    image = Image(root, dict(machine), folder=root)
    declared: dict[str, str] = {}
    for name, rest in instructions(ROOT / "Dockerfile"):
        text = image.placed(rest)
        if name == "FROM":
            image = Image(root, dict(machine), folder=root)
        elif name == "ARG":
            key, _, default = text.partition("=")
            declared[key] = arguments.get(key, default)
        elif name == "ENV":
            for key, value in re.findall(r"(\w+)=(\S+)", text):
                image.environment[key] = value.replace("$PATH", image.environment["PATH"])
        elif name == "WORKDIR":
            image.folder = Path(text)
            image.folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and not text.startswith("--from="):
            *sources, target = text.split()
            for source in sources:
                _copy(files, source, image.folder / target)
        elif name == "RUN":
            environment = {**declared, **image.environment}
            subprocess.run(["sh", "-euc", text], cwd=image.folder, env=environment, check=True)
            after(rest)
        elif name == "ENTRYPOINT":
            image.entrypoint = json.loads(text)
        elif name == "CMD":
            image.command = json.loads(text)
        elif name == "USER":
            image.user = text
        else:
            assert name in ("COPY", "LABEL", "VOLUME"), name
    return image


def _copy(files: Sequence[Path], source: str, target: Path) -> None:
    """Copy a file of the build context into a folder, or a folder's content."""
    found = [path for path in files if path.parts[: len(Path(source).parts)] == Path(source).parts]
    assert found, f"COPY {source}: not in the build context"
    for path in found:
        inner = path.relative_to(source)
        place = target / (inner if inner.parts else path.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, place)


if __name__ == "__main__":
    given = dict(text.split("=", 1) for text in sys.argv[2:])
    made = build(Path(sys.argv[1]).absolute(), given, os.environ)
    print(made.run().stdout)
