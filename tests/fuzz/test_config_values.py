"""Command lines of any content: each override works, or is refused in words that name it."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis, of the dev extra")

from hypothesis import given
from hypothesis import strategies as st

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import compose
from rlhf_exp.config.overrides import override_problems, prepare, sweep_points
from rlhf_exp.config.problems import Problem
from rlhf_exp.config.schema_keys import all_keys, read_groups
from rlhf_exp.errors import UserError
from tests.fuzz.lab import fuzz

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
GROUPS = read_groups()
KEYS = all_keys()
TEXT_KEYS = sorted(name for name, key in KEYS.items() if key.type.startswith("text"))


PIECES = st.one_of(
    st.sampled_from(
        [
            *[
                "1",
                "-1",
                "0",
                "1e400",
                "nan",
                "inf",
                "1_000",
                "2024_01_02",
                "0x10",
                "07",
                "1.5",
                "-0.0",
            ],
            *[
                "null",
                "true",
                "off",
                "None",
                "~",
                "''",
                '"',
                "'",
                "\\",
                "\\'",
                "$",
                "${seed}",
                "${",
                "}",
            ],
            *[
                "${oc.env:HOME}",
                "${nowhere}",
                "[",
                "]",
                "{",
                "a:1",
                ",",
                "=",
                "+",
                "(",
                ")",
                "@",
                "/",
                " ",
            ],
            *[
                "choice(1,2)",
                "range(1,3)",
                "glob(*)",
                "interval(0,1)",
                "sort(",
                "shuffle(1)",
                "str(1)",
            ],
            *[
                "\n",
                "\t",
                "\0",
                "é",
                "🙂",
                "\ud83d",
                "../x",
                "~/x",
                "latest",
                "tiny",
                "best",
                "#",
                "%d",
            ],
            *["a" * 300, "9" * 5000, "[" * 200, "{a:" * 50],
        ]
    ),
    st.text(max_size=6),
)
VALUES = st.lists(PIECES, max_size=4).map("".join)
NAMES = st.one_of(
    st.sampled_from(sorted(KEYS)),
    st.sampled_from(sorted(KEYS)),
    st.sampled_from(sorted(GROUPS)),
    st.sampled_from(
        ["hydra.job.name", "hydra.mode", "hydra/launcher", "hydra/sweeper", "ppo", "nowhere"]
    ),
    st.text(max_size=8),
)
PREFIXES = st.sampled_from(["", "", "", "", "+", "++", "~"])


@st.composite
def overrides(draw: st.DrawFn) -> str:
    return (
        f"{draw(PREFIXES)}{draw(NAMES)}{draw(st.sampled_from(['=', '=', '=', '']))}{draw(VALUES)}"
    )


@fuzz(3000)
@given(given_overrides=st.lists(overrides(), min_size=1, max_size=3))
def test_any_override_is_taken_or_refused_in_words(given_overrides: list[str]) -> None:
    prepared = prepare(given_overrides, GROUPS)
    problems = override_problems(prepared, GROUPS)
    for problem in problems:
        assert isinstance(problem, Problem)
        assert str(problem)
    if not problems:
        try:
            points = sweep_points(prepared)
        except UserError as error:
            assert str(error)  # noqa: PT017 - a refusal in words is one of two right ends
        else:
            assert points


def compose_and_check(given_overrides: list[str]) -> None:
    """Do what the launcher does before Hydra starts a job."""
    prepared = prepare(given_overrides, GROUPS)
    if override_problems(prepared, GROUPS):
        return
    try:
        for point in sweep_points(prepared)[:2]:
            for problem in config_problems(compose(point).config):
                assert str(problem)
    except UserError as error:
        assert str(error)  # noqa: PT017 - a refusal in words is one of two right ends


@fuzz(300)
@given(given_overrides=st.lists(overrides(), min_size=1, max_size=3))
def test_what_is_taken_composes_or_is_refused_in_words(given_overrides: list[str]) -> None:
    compose_and_check(given_overrides)


@fuzz(300)
@given(name=st.sampled_from(sorted(KEYS)), value=VALUES)
def test_any_value_of_any_key(name: str, value: str) -> None:
    compose_and_check([f"{name}={value}"])


PLAIN = st.text(
    st.characters(
        codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="\\'\"$,(){}[]=:"
    ),
    min_size=1,
    max_size=10,
)
LITERALS = st.sampled_from(
    ["2024_01_02", "1e5", "0123", "1_000", "3", "-1", "12e34", "nan", "true"]
)


@fuzz(150)
@given(value=st.one_of(LITERALS, PLAIN))
def test_text_stays_the_text_that_was_typed(value: str) -> None:
    prepared = prepare([f"name={value}"], GROUPS)
    if override_problems(prepared, GROUPS) or value.lower() in {"null", "none"}:
        return
    assert compose(prepared).config.name == value
