from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import compose
from rlhf_exp.config.evaluation import ScorerKind
from rlhf_exp.errors import UserError
from rlhf_exp.function_source import (
    declared_fields,
    function_module,
    function_source,
    names_function,
    takes_rows,
)
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.user_function import load_function


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's in the current folder, whose module imports another of its own."""
    package = tmp_path / "mine_of_tests"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported too early')\n")
    (package / "words.py").write_text("LIMIT = 3\n")
    module = package / "rewards.py"
    module.write_text("from .words import LIMIT\ndef score(prompts, responses): return [LIMIT]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module


@pytest.mark.parametrize(
    ("reference", "module"),
    [
        ("a/b.py:f", None),
        ("b.py:f", None),
        ("a.b:f", "a.b"),
        ("b:f", "b"),
    ],
)
def test_a_file_or_a_module(reference: str, module: str | None) -> None:
    assert names_function(reference)
    assert function_module(reference) == module


@pytest.mark.parametrize("text", ["org/model", "alt-profanity-check", "./folder", "a b:f", "c:/x"])
def test_what_names_no_function(text: str) -> None:
    assert not names_function(text)


def test_a_module_is_found_without_running_its_package(mine: Path) -> None:
    assert function_source("mine_of_tests.rewards:score") == (mine, "score")
    assert function_source("rlhf_exp.errors:UserError")[0].name == "errors.py"
    overrides = ["stage=ppo", "ppo.reward.function=mine_of_tests.rewards:score"]
    config = compose(overrides).config
    assert config_problems(config) == []
    key = plan(config)[-1].key
    mine.write_text(mine.read_text() + "WORSE = 1\n")
    assert plan(config)[-1].key != key


def test_a_module_that_is_not_there(mine: Path) -> None:
    def complaint(reference: str) -> str:
        overrides = ["stage=ppo", f"ppo.reward.function={reference}"]
        (problem,) = config_problems(compose(overrides).config)
        return str(problem)

    assert "there is no module mine_of_tests.other here, nor" in complaint("mine_of_tests.other:f")
    assert "its functions are score" in complaint("mine_of_tests.rewards:f")
    scorer = compose(["eval.toxicity.scorer=mine_of_tests.rewards:score"]).config.eval.toxicity
    assert scorer.scorer_kind is ScorerKind.function


def test_a_modules_function_runs_with_its_package(mine: Path) -> None:
    reference = "mine_of_tests.rewards:score"
    with pytest.raises(UserError, match=r"importing mine_of_tests\.rewards failed"):
        load_function(reference, "key")
    (mine.parent / "__init__.py").write_text("")
    assert load_function(reference, "key")([], []) == [3]
    with pytest.raises(UserError, match=r"mine_of_tests\.rewards has no function 'other'"):
        load_function("mine_of_tests.rewards:other", "key")


def _two(prompts: list[str], responses: list[str], weight: float = 1.0) -> None: ...
def _three(texts: list[str], answers: list[str], facts: list[dict[str, str]]) -> None: ...
def _named(prompts: list[str], responses: list[str], rows: object = None) -> None: ...
def _any(*columns: list[str]) -> None: ...
def _one(texts: list[str]) -> None: ...
def _four(a: str, b: str, c: str, d: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "takes"), [(_two, False), (_three, True), (_named, True), (_any, False)]
)
def test_which_reward_functions_take_rows(function: Callable[..., None], takes: bool) -> None:
    assert takes_rows(signature(function)) is takes


@pytest.mark.parametrize(("function", "found"), [(_one, "(texts)"), (_four, "(a, b, c, d)")])
def test_a_reward_function_of_other_arguments(function: Callable[..., None], found: str) -> None:
    with pytest.raises(TypeError) as caught:
        takes_rows(signature(function))
    assert f"it takes {found}; expected (prompts, responses)" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('FIELDS = ("answer", "unit")', ("answer", "unit")),
        ('FIELDS: tuple[str, ...] = ("answer",)', ("answer",)),
        ('FIELDS = ("answer")', ("answer",)),
        ("FIELDS: tuple[str, ...]", ()),
        ("FIELDS = names()", ()),
    ],
)
def test_the_fields_that_a_file_says_it_needs(
    line: str, found: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(f"{line}\n")
    assert declared_fields(f"{tmp_path / 'mine.py'}:score") == found
