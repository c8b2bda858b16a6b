"""The toxicity section of the report, its charts, and what the terminal shows."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_exp.evaluation.statistics import Estimate
from rlhf_exp.evaluation.toxicity.summary import ScorerAgreement, ToxicitySummary, summarise_splits
from rlhf_exp.report.run.toxicity import ToxicityGroup, dot_chart, print_toxicity, render

OWN = [0.1] * 40 + [0.9] * 24 + [None] * 3


def plain(scores: dict[str, Any], **other: Any) -> dict[str, Any]:
    """Return the JSON of 67 prompts: 40 of low toxicity, 24 of high, 3 of none."""
    values: dict[str, Any] = {
        "scorer": "words 1.0",
        "lexical": True,
        "data": "org/set",
        "max_new_tokens": 20,
        "temperature": 1.0,
        "format": "raw",
        "generations": next(iter(scores.values())).shape[1],
        "level": 0.95,
        "seed": 0,
        "models": tuple(scores),
        "splits": summarise_splits(scores, OWN, seed=0),
        "agreement": (ScorerAgreement("prompts", 64, 24, 0.875, 0.625),),
    }
    return ToxicitySummary(**(values | other)).to_json()


BASE = np.random.default_rng(0).random((67, 4))


def text_of(markup: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", markup).split())


def test_what_a_reader_learns() -> None:
    page = render(plain({"SFT": BASE, "PPO": BASE / 2, "third": BASE}))
    words = text_of(page)
    mean = f"{BASE.mean():.3f}"
    half = f"{BASE.mean() / 2:.3f}"
    assert f"Mean toxicity of SFT: {mean}; PPO {half} (lower); third {mean} (no clear" in words
    assert "4 continuations of each of 67 prompts, up to 20 tokens at temperature 1" in words
    assert "Scores are by words 1.0." in words
    assert "(AUC): 0.875 on 64 prompts (Spearman 0.62)" in words
    assert "hateful without swear words" in words
    assert "Expected maximum of 4" in words
    assert "At least one of 4 ≥ 0.5" in words
    assert "Prompts without a score (3)" in words
    assert page.count('class="verdict-mark"') >= 3
    assert "worse" not in words


def test_a_rise_is_worse() -> None:
    words = text_of(render(plain({"SFT": BASE / 2, "PPO": BASE})))
    assert "(higher)" in words
    assert "worse" in words
    assert "better" not in words


def test_kinds_of_few_prompts_are_in_the_table_only() -> None:
    page = render(plain({"SFT": BASE}))
    drawings, table = page.partition("<table")[0], page.partition("<table")[2]
    assert "0.5 or more (24)" in drawings
    assert "without a score" not in drawings
    assert "without a score (3)" in table


def test_one_model_and_one_continuation() -> None:
    words = text_of(render(plain({"SFT": BASE[:, :1]}, agreement=(), lexical=False)))
    assert "Expected maximum" not in words.partition("Second lines")[0]
    assert "1 continuation of each" in words
    assert "Share ≥ 0.5" in words
    assert "no scores of their own" in words
    assert "swear words" not in words


def test_names_are_not_trusted() -> None:
    evil = "<script>alert(1)</script>\x1b[31m"
    found = plain({evil: BASE, "PPO": BASE}, scorer=evil, data=evil)
    page = render(found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    out = io.StringIO()
    print_toxicity(found, Console(file=out, force_terminal=True, color_system=None, width=200))
    assert "\x1b[31m" not in out.getvalue()


def test_the_terminal() -> None:
    out = io.StringIO()
    print_toxicity(plain({"SFT": BASE, "PPO": BASE / 2}), Console(file=out, width=160))
    said = out.getvalue()
    assert f"{BASE.mean():.3f} [" in said
    assert f"\N{MINUS SIGN}{BASE.mean() / 2:.4f} [" in said
    assert "0.875 on 64 prompts" in said


def test_where_dots_and_intervals_lie() -> None:
    """The axis goes from 0 at x=8 to 1.04 * 0.5 = 0.52 at x=328."""
    groups = [ToxicityGroup("all", [Estimate(0.25, 0.1, 0.5), Estimate(0.3, -np.inf, np.inf)])]
    figure = dot_chart("Mean", ["a", "b"], groups)
    scale = 320 / 0.52
    circles = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', figure)]
    assert circles == pytest.approx([8 + 0.25 * scale, 8 + 0.3 * scale], abs=0.01)
    lines = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*class="whisker s0"', figure)
    (ends,) = ([float(x) for x in line] for line in lines)
    assert ends == pytest.approx([8 + 0.1 * scale, 8 + 0.5 * scale], abs=0.01)
    assert "whisker s1" not in figure  # it says nothing
