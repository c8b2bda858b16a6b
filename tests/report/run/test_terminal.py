"""The table in the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.report.run.terminal import print_comparison


def printed(result: ModelComparison) -> str:
    file = io.StringIO()
    print_comparison(result, Console(file=file, width=80, force_terminal=True, color_system=None))
    return file.getvalue()


def test_the_numbers_stand_in_eighty_columns(compare: Callable[..., ModelComparison]) -> None:
    text = printed(compare())
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    (reward,) = (line for line in lines if "Reward, raw" in line)
    assert "0.280" in reward  # mean difference (60 - 32) / 100, in one line with its interval
    assert "]" in reward
    flat = " ".join(text.replace("\xa0", " ").split())
    assert "30 wins, 54 ties, 16 losses; wins 0.652 of the decided [0.498, 0.786]" in flat
    assert "exact sign test p = 0.054" in flat


def test_how_answers_were_sampled(compare: Callable[..., ModelComparison]) -> None:
    assert "answers of up to 9 tokens" in printed(replace(compare(), sampling="up to 9 tokens"))
    assert "answers of" not in printed(compare())


def test_names_neither_style_nor_steer_the_terminal(
    compare: Callable[..., ModelComparison],
) -> None:
    text = printed(compare(name_a="[red]x[/red]", name_b="\x1b[2Jy"))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert "\u241b[2Jy" in text
