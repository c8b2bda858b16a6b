"""What other interpreters run: nothing of this project, and nothing that hides their libraries."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_exp.engines.process import program_of
from rlhf_exp.trl import plan as trl_plan
from rlhf_exp.trlx import plan as trlx_plan

SHARED, _ = program_of(trl_plan.WORKER)
OWN = {"trl": program_of(trl_plan.WORKER)[1].parent, "trlx": program_of(trlx_plan.WORKER)[1].parent}


def modules(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.py") if not path.stem.startswith("__")}


@pytest.mark.parametrize("engine", OWN)
def test_a_worker_needs_nothing_of_this_project(engine: str) -> None:
    own, shared = modules(OWN[engine]), modules(SHARED)
    assert all(name.startswith(f"{engine}_") for name in own)
    assert all(name.startswith("engine_") for name in shared)
    for path in [*own.values(), *shared.values(), SHARED / "__main__.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "rlhf_exp"], path


@pytest.mark.parametrize(("engine", "plan"), [("trl", trl_plan), ("trlx", trlx_plan)])
def test_all_of_a_worker_counts_as_code_of_its_stage(engine: str, plan: ModuleType) -> None:
    named = {name.rpartition(".")[2] for name in (plan.WORKER, *plan.WORKER_PARTS)}
    assert named == set(modules(OWN[engine]))
    assert not named & sys.stdlib_module_names


def engine_line() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_line", SHARED / "engine_line.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_response_is_cut_at_its_first_end() -> None:
    def decode(ids: list[int]) -> str:
        return "".join(chr(token) for token in ids)

    until_ended = engine_line().until_ended
    ids = [ord(letter) for letter in "ab STOP cd"]
    assert until_ended(ids, [], decode, ["STOP"]) == ids[:7]
    assert until_ended(ids, [ord("b"), ord("c")], decode, ["STOP"]) == ids[:2]
    assert until_ended(ids, [ord("c")], decode, ["STOP"]) == ids[:7]
    assert until_ended(ids, [], decode, ["NONE"]) == ids
