"""An artifact: the folder of a stage's result, with a manifest of how it was made."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Self

from rlhf_exp.errors import UserError
from rlhf_exp.redaction import without_secrets
from rlhf_exp.store.sealed import file_digest_once

MANIFEST = "manifest.json"
# Left by whoever copies the code away from its work tree: the state of that, as `git_state` had it.
GIT_STATE = "git-state.json"
# A diff beyond this is cut: it is a record for people, not a backup of their working tree.
DIFF_LIMIT = 200_000
GIT_TIMEOUT_S = 20
HASHING_THREADS = 4
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "safetensors",
    "datasets",
    "numpy",
    "hydra-core",
    "wandb",
)


def now() -> str:
    """Return the time as ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class FileEntry:
    """A file of an artifact: sha256 of its content (64 hex characters), size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """The origin of an artifact: code, config, parents and the results by number.

    Attributes:
        stage: the stage that made it.
        key: its key in the store.
        created: ISO 8601 time in UTC.
        config: the resolved config of the run.
        parents: the keys of the artifacts it was made from, by role.
        inputs: digests of their weights, by role: one made again under its key may have others.
        metrics: final metrics by name.
        git: see `git_state`.
        versions: see `package_versions`.
        world_size: number of processes.
        wandb_run_id: the run that trained it, if tracked.
        code: digest by source file of the code that made it (see `code_digest.code_digests`).
        files: every file but the manifest, by relative path with slashes; filled by `publish`.
        duration_s: seconds of work, resumed parts included.
        objective: the number that a sweep optimises, if the stage has it.
    """

    stage: str
    key: str
    created: str = field(default_factory=now)
    config: dict[str, Any] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    wandb_run_id: str | None = None
    code: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    duration_s: float = 0.0
    objective: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values; enum members become names, paths strings."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read the output of `to_json`; fields of a later version are left out.

        Raises:
            KeyError, TypeError: not a manifest.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        for name in known & values.keys():
            expected = _JSON_TYPES.get(name, str)
            if not isinstance(values[name], expected):
                raise TypeError(f"{name} is {values[name]!r}")
        values["files"] = {
            name: FileEntry(str(entry["sha256"]), int(entry["size"]))
            for name, entry in content["files"].items()
        }
        return cls(**values)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest in `folder`.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be read as one.
        """
        path = folder / MANIFEST
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not a readable manifest ({type(error).__name__}: {error}); the artifact "
                f"is damaged. Remove the folder {folder}; the next run makes it again"
            ) from error


# Of the manifest's fields that are no text.
_JSON_TYPES: dict[str, type | UnionType] = {
    **dict.fromkeys(("config", "parents", "inputs", "metrics", "git", "versions"), dict),
    **dict.fromkeys(("code", "files"), dict),
    "world_size": int,
    "wandb_run_id": str | None,
    "duration_s": float | int,
    "objective": float | int | None,
}


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return self.manifest.stage

    @property
    def key(self) -> str:
        """Its key in the store."""
        return self.manifest.key

    @property
    def size(self) -> int:
        """Bytes in its files, the manifest left out."""
        return sum(entry.size for entry in self.manifest.files.values())

    def verify(
        self, wanted: Callable[[str], bool] = lambda name: True, *, contents: bool = True
    ) -> None:
        """Check that the files are those that were published.

        Args:
            wanted: which files, by relative name with slashes; all by default.
            contents: also read every file and compare its digest, at a second or less per GB;
                False compares only presence and size, which takes no time.

        Raises:
            UserError: naming the damaged file and the remedy.
        """
        names = [name for name in self.manifest.files if wanted(name)]
        for name in names:
            self._check_size(name)
        if contents:
            # Hashing leaves the interpreter's lock.
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                list(pool.map(self._check_digest, names))

    def damaged_files(self, wanted: Callable[[str], bool]) -> list[str]:
        """Return those of the wanted files that are missing or of another size than published."""
        damaged = []
        for name in filter(wanted, self.manifest.files):
            try:
                self._check_size(name)
            except UserError:
                damaged.append(name)
        return damaged

    def file(self, name: str) -> Path | None:
        """Return the path of a file that the stage left, or `None` if it left none.

        Raises:
            UserError: it is not as it was published.
        """
        path = self.path / name
        if name not in self.manifest.files:
            return path if path.is_file() else None
        self._check_size(name)
        self._check_digest(name)
        return path

    def json(self, name: str) -> Any:  # noqa: ANN401 - whatever the stage wrote
        """Return the content of a JSON file that the stage left, or `None` if it left none.

        Raises:
            UserError: it is not as it was published.
        """
        path = self.file(name)
        if path is None:
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(self._damage(path, f"is not JSON ({error})")) from error

    def _check_size(self, name: str) -> None:
        path, entry = self.path / name, self.manifest.files[name]
        if not path.is_file():
            raise UserError(self._damage(path, "is missing"))
        size = path.stat().st_size
        if size != entry.size:
            raise UserError(self._damage(path, f"has {size} bytes, {entry.size} were published"))

    def _check_digest(self, name: str) -> None:
        path, published = self.path / name, self.manifest.files[name].sha256
        try:
            digest = file_digest_once(path)
        except OSError as error:
            raise UserError(self._damage(path, f"cannot be read ({error.strerror})")) from error
        if digest != published:
            found = f"has sha256 {digest[:12]}..., not {published[:12]}..."
            raise UserError(self._damage(path, found))

    def _damage(self, path: Path, what: str) -> str:
        return (
            f"{path} {what}: the artifact is damaged. Restore the file, make the artifact again "
            f"with rerun=[{self.stage}], or remove it with `rlhf-exp store rm {self.stage}/"
            f"{self.key}`; the next run makes it again"
        )


def git_state(repo: Path) -> dict[str, Any]:
    """Return `revision`, `dirty`, `diff` (cut at 200 kB) and `untracked` files of the work tree.

    Empty where there is no git, no commit, or nothing at `repo` is under its control (a package
    installed below somebody else's repository).
    """
    if (repo / GIT_STATE).is_file():
        state: dict[str, Any] = json.loads((repo / GIT_STATE).read_text(encoding="utf-8"))
        return state
    folder = str(repo)
    revision = _git(folder, "rev-parse", "HEAD")
    if revision is None or _git(folder, "ls-files", "--error-unmatch", "--", ".") is None:
        return {}
    diff = _git(folder, "diff", "--no-color", "--no-ext-diff", "HEAD") or ""
    untracked = (_git(folder, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    if len(diff) > DIFF_LIMIT:
        diff = f"{diff[:DIFF_LIMIT]}\n... cut: {len(diff) - DIFF_LIMIT} more characters\n"
    return {
        "revision": revision.strip(),
        "dirty": bool(diff or untracked),
        "diff": without_secrets(diff),
        "untracked": untracked[:100],
    }


def _git(folder: str, *arguments: str) -> str | None:
    # Without optional locks, so that many jobs looking at one work tree do not block its owner.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True,
            env=environment,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed; imports none."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
