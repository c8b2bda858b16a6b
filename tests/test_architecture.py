"""The rules of the architecture that a program can check.

Layers, who sees a config, and circles: the contracts of `[tool.importlinter]` in pyproject.toml.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_exp"
HEAVY = ("torch", "transformers", "accelerate", "datasets", "wandb", "numpy", "scipy", "peft")
HEAVY += ("optuna",)


def test_import_contracts_are_kept() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_init_files_are_empty() -> None:
    filled = [path for path in PACKAGE.rglob("__init__.py") if path.stat().st_size]
    assert filled == [PACKAGE / "__init__.py"], "the version and the names of the interface"
    # setuptools reads the version without importing anything.
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', filled[0].read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--help", "ppo"], ["--cfg", "job"], ["ppo.lrr=1"], ["ppo.lr=0"]]
)
def test_nothing_heavy_is_imported_before_a_run(arguments: list[str]) -> None:
    program = (
        "import sys; from rlhf_exp.hydra_app import main\n"
        f"sys.argv = ['launch.py', *{arguments}]; main(sys.argv[1:])\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "HEAVY []"
