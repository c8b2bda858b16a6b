"""The house's rules that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_exp"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# A module imports only from its own layer and from layers above it in this list.
LAYERS = (
    "errors",
    "config",
    "batch",
    "algo",
    "data",
    "http",
    "models",
    "rollout",
    "distributed",
    "store",
    "tracking",
    "engines",
    "evaluation",
    "human",
    "serving",
    "search",
    "stages",
    "pipeline",
    "report",
    "experiment",
    "study",
    "multirun",
    "slurm",
    "commands",
    "cli",
    "command",
)
# Only these see a config; what is below them takes plain values.
SEE_CONFIG = ("config", "stages", "pipeline", "experiment", "study", "multirun", "slurm")
SEE_CONFIG += ("commands", "cli", "command")
HEAVY = ("torch", "transformers", "accelerate", "datasets", "wandb", "numpy", "scipy", "peft")
HEAVY += ("optuna",)


def layer(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def imported_layers(module: str) -> Iterator[tuple[str, int]]:
    """Yield the layers that a module imports anywhere, functions included, with line numbers."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            base = node.module or ""
            names = [f"{base}.{a.name}" for a in node.names] if base == "rlhf_exp" else [base]
        for name in names:
            if name.startswith("rlhf_exp."):
                yield name.split(".")[1], node.lineno


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__.py"])
def test_imports_go_up_only(module: str) -> None:
    assert layer(module) in LAYERS, f"{module}: which layer is it?"
    own = LAYERS.index(layer(module))
    for other, line in imported_layers(module):
        assert LAYERS.index(other) <= own, f"{module}:{line} imports {other}, a layer below it"
        if other == "config":
            assert layer(module) in SEE_CONFIG, f"{module}:{line} should take plain values"


def test_init_files_are_empty() -> None:
    filled = [name for name in MODULES if name.endswith("__init__.py") and size(name)]
    assert filled == []


def size(module: str) -> int:
    return (PACKAGE / module).stat().st_size


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    text = (PACKAGE / module).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring
            assert length <= 50, f"{module}:{node.lineno} {node.name} has {length} lines"


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
