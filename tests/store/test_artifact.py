import json
import math
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    git_state,
    package_versions,
)
from rlhf_exp.store.store import Store


class Mode(Enum):
    fast = 1


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    store = Store(tmp_path / "store")
    folder = store.staging("sft", "abc1")
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_bytes(b"0123456789")
    (folder / "metrics.jsonl").write_text("{}\n")
    return store.publish("sft", "abc1", folder, Manifest("sft", "abc1"))


def test_manifest_survives_json(tmp_path: Path) -> None:
    manifest = Manifest(
        "ppo",
        "abc1",
        created="2026-01-02T03:04:05+00:00",
        config={"lr": 1e-5, "mode": Mode.fast, "path": Path("x/y"), "clip": math.inf, "t": (1, 2)},
        parents={"sft": "def2"},
        metrics={"reward": 1.25, "lost": math.nan},
        git={"revision": "r", "dirty": True, "diff": "d"},
        versions={"torch": "2"},
        world_size=8,
        wandb_run_id="w1",
        code={"rlhf_exp/a.py": "1"},
        files={"model": FileEntry("00", 3)},
        duration_s=1.5,
        objective=0.25,
    )
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest.to_json(), "of_a_later_version": 1}))
    back = Manifest.read(tmp_path)
    assert back.config == {"lr": 1e-5, "mode": "fast", "path": "x/y", "clip": math.inf, "t": [1, 2]}
    assert math.isnan(back.metrics["lost"])
    assert back.metrics["reward"] == 1.25
    for name in ("stage", "key", "created", "parents", "git", "versions", "world_size"):
        assert getattr(back, name) == getattr(manifest, name)
    for name in ("wandb_run_id", "code", "files", "duration_s", "objective"):
        assert getattr(back, name) == getattr(manifest, name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "sft"}', '{"files": {"a": 1}}'])
def test_a_manifest_that_is_none_names_the_file_and_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a readable manifest.*Remove"):
        Manifest.read(tmp_path)


def test_an_untouched_artifact_verifies(artifact: Artifact) -> None:
    artifact.verify()
    assert artifact.size == 13  # 10 bytes of weights, 3 of metrics
    assert set(artifact.manifest.files) == {"model/weights.bin", "metrics.jsonl"}


def test_verify_names_a_changed_file(artifact: Artifact) -> None:
    (artifact.path / "model" / "weights.bin").write_bytes(b"0123456780")
    artifact.verify(contents=False)  # presence and size only
    with pytest.raises(UserError, match=r"weights\.bin has sha256.*store rm sft/abc1"):
        artifact.verify()


@pytest.mark.parametrize("contents", [True, False])
def test_verify_names_a_short_and_a_missing_file(artifact: Artifact, contents: bool) -> None:
    path = artifact.path / "model" / "weights.bin"
    path.write_bytes(b"01234")
    with pytest.raises(UserError, match=r"weights\.bin has 5 bytes, 10 were published"):
        artifact.verify(contents=contents)
    path.unlink()
    with pytest.raises(UserError, match=r"weights\.bin is missing"):
        artifact.verify(contents=contents)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {}  # no repository
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {}  # no commit
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("venv/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = git_state(tmp_path)
    assert clean == {
        "revision": git(tmp_path, "rev-parse", "HEAD").strip(),
        "dirty": False,
        "diff": "",
        "untracked": [],
    }
    (tmp_path / "a.py").write_text("x = 2\n")
    (tmp_path / "b.py").write_text("")
    dirty = git_state(tmp_path)
    assert dirty["dirty"] is True
    assert "-x = 1\n+x = 2\n" in dirty["diff"]
    assert dirty["untracked"] == ["b.py"]
    (tmp_path / "venv").mkdir()
    # A package installed below somebody else's repository is not of that repository.
    assert git_state(tmp_path / "venv") == {}


def test_a_huge_diff_is_cut(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "a").write_text("0123456789\n" * 30_000)
    diff = git_state(tmp_path)["diff"]
    assert 200_000 < len(diff) < 200_100
    assert diff.rstrip().endswith("more characters")


def test_package_versions_names_what_is_installed() -> None:
    versions = package_versions(["pytest", "no-such-package-at-all"])
    assert versions == {
        "python": sys.version.split()[0],
        "pytest": pytest.__version__,
    }


def test_the_store_imports_nothing_heavy() -> None:
    modules = (
        "store.store",
        "commands.store",
        "store.run_records",
        "store.code_digest",
        "store.lease",
    )
    imports = "; ".join(f"import rlhf_exp.{name}" for name in modules)
    heavy = "{'torch', 'transformers', 'numpy', 'wandb', 'rich'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import sys; {imports}; print(sorted({heavy}))"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
