"""The wheel works where there is no checkout: `rlhf-exp run` has configs and launchers with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import SMALL

ROOT = Path(__file__).parents[1]
SOURCES = (
    "conf",
    "hydra_plugins",
    "rlhf_exp",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "setup.py",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; what it needs comes from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    (folder / "source").mkdir()
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        copy = shutil.copytree(source, target, ignore=ignored) if source.is_dir() else None
        if copy is None:
            shutil.copy2(source, target)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-compile", "--target", folder / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


def rlhf_exp(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, site / "bin" / "rlhf-exp", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_its_files_are_those_of_the_checkout(site: Path) -> None:
    theirs = {path.relative_to(site) for path in site.rglob("*.yaml")}
    assert theirs == {
        Path("rlhf_exp", path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")
    }
    assert (site / "hydra_plugins" / "rlhf_exp_local.py").is_file()
    (licence,) = site.rglob("LICENSE")
    assert "Apache License" in licence.read_text()


def test_help_version_and_a_plan(site: Path, tmp_path: Path) -> None:
    version = rlhf_exp(site, tmp_path, "--version").stdout
    assert version.startswith("rlhf-exp 0.")
    shown = rlhf_exp(site, tmp_path, "run", "--help").stdout
    assert "  rlhf-exp run plan=true ..." in shown
    assert "hh_gptj_6b" in shown
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\ndefaults:\n  - smoke\nsft: {steps: 3}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(mine)
    ended = rlhf_exp(
        site, tmp_path, "run", "-m", "name=a", "experiment=mine", "plan=true", "seed=0,1"
    )
    assert (ended.returncode, ended.stdout.count("fits 80 GB")) == (0, 2)
    ended = rlhf_exp(site, tmp_path, "run", "experiment=mine", "--cfg", "job", "-p", "sft.steps")
    assert ended.stdout == "3\n"
    assert "no such key" in rlhf_exp(site, tmp_path, "run", "ppo.lrr=1").stderr


@pytest.mark.slow
def test_a_multirun_side_by_side_and_its_report(site: Path, tmp_path: Path) -> None:
    given = ["name=pair", "experiment=smoke", "ppo.steps=2", "ppo.seed=0,1"]
    ended = rlhf_exp(site, tmp_path, "run", "-m", "hydra/launcher=parallel", *given)
    assert ended.returncode == 0, ended.stderr
    page = tmp_path / "outputs" / "reports" / "sweep-pair.html"
    assert rlhf_exp(site, tmp_path, "report", "pair").returncode == 0
    assert "rlhf-exp run name=pair-best" in page.read_text()


@pytest.mark.slow
def test_a_new_users_first_run_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    """The script whose output docs/how-to/install.md shows, at smaller sizes."""
    entry = tmp_path / "bin" / "rlhf-exp"
    entry.parent.mkdir()
    entry.write_text(f'#!/bin/sh\nexec {sys.executable} {site / "bin" / "rlhf-exp"} "$@"\n')
    entry.chmod(0o755)
    (tmp_path / "empty").mkdir()
    ended = subprocess.run(
        ["bash", ROOT / "tests" / "first_run.sh", *SMALL],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(site), "PATH": f"{entry.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "all steps done"
    pages = {path.name for path in (tmp_path / "empty" / "outputs" / "reports").glob("*.html")}
    assert "sweep-pair.html" in pages
    assert len([name for name in pages if name.startswith("eval-")]) == 3
    # Two points in a sweep of their own, of which the one with the usual rate is the first run.
    assert len(list((tmp_path / "empty" / "outputs" / "store" / "ppo").iterdir())) == 3
