"""The section on the reward model, from what its part leaves behind."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rlhf_exp.report.run import reward_quality


def share(count: int, total: int, low: float = 0.4, high: float = 0.9) -> dict[str, Any]:
    return {"count": count, "total": total, "interval": {"low": low, "high": high}}


def judge(name: str, **changes: Any) -> dict[str, Any]:
    bins = [
        {"low": 0.0, "high": 0.5, "right": share(3, 5), "expected": 0.55},
        {"low": 0.6, "high": 2.0, "right": share(4, 5), "expected": 0.8},
    ]
    values: dict[str, Any] = {
        "judge": name,
        "accuracy": share(7, 10, 0.348, 0.933),
        "auc": 0.66,
        "margin": 0.5,
        "margin_bins": bins,
        "calibration": {
            "bins": [{"predicted": 0.6, "observed": 0.7, "count": 10}],
            "error": 0.1,
        },
        "length": {
            "pearson": 0.2,
            "spearman": 0.1,
            "within": -0.25,
            "model_longer": share(6, 9),
            "label_longer": share(5, 9, 0.212, 0.863),
            "right_longer": share(4, 5),
            "right_shorter": share(2, 4),
            "controlled_accuracy": 0.65,
        },
        "chosen_over_blank": share(9, 10),
        "rejected_over_blank": share(8, 10),
    }
    return values | changes


def gain(mean: float) -> dict[str, float | None]:
    return {"mean": mean, "low": mean - 0.25, "high": mean + 0.25}


def content(**changes: Any) -> dict[str, Any]:
    lengths = [{"tokens": 5.0, "score": 0.1, "error": 0.05, "count": 4}]
    spread = {"name": "<b>SFT</b>", "count": 4, "mean": -0.5, "std": 1.0, "shares": [0.5, 0.5]}
    point = {"label": "PPO, step 96", "kl": 4.0}
    gains = {"reward model": gain(1.5), "referee": gain(0.5)}
    values: dict[str, Any] = {
        "judges": ["reward model", "referee"],
        "referee": {"name": "<i>other</i>", "seed": 1, "part": "2/2", "shared": 0.0},
        "pairs": [judge("reward model"), judge("referee")],
        "agreement": {"referee": share(8, 10)},
        "answers": [
            {
                "model": "<b>SFT</b>",
                "tokens": 23.0,
                "length_spearman": 0.3,
                "by_length": lengths,
                "judges_spearman": {"referee": None},
            }
        ],
        "distributions": {"edges": [-1.0, 0.0, 1.0], "kinds": [spread]},
        "prompts": 100,
        "best_of": 16,
        "paths": [{"name": "PPO", "points": [{**point, "gains": gains}]}],
    }
    return values | changes


def test_numbers_in_words() -> None:
    rows = dict(reward_quality.measures([judge("reward model")]))
    nbsp = "\N{NO-BREAK SPACE}"
    assert rows["Accuracy"] == [f"70.0{nbsp}% [34.8{nbsp}%, 93.3{nbsp}%]"]
    assert rows["Accuracy, length held equal"] == [f"65.0{nbsp}%"]
    assert rows["Correlation with length, within pairs"] == ["\N{MINUS SIGN}0.25"]
    assert rows["AUC, across prompts"] == ["0.660"]
    (step,) = reward_quality.step_rows(content()["paths"][0], ["reward model", "referee", "gold"])
    assert step["gains"] == ["+1.50 [+1.25, +1.75]", "+0.50 [+0.25, +0.75]", "\N{EN DASH}"]


def test_whatever_is_not_known_has_a_dash() -> None:
    length = {**judge("x")["length"], "controlled_accuracy": None}
    rows = dict(reward_quality.measures([judge("reward model", length=length)]))
    assert rows["Accuracy, length held equal"] == ["\N{EN DASH}"]
    unknown = {"mean": 1.0, "low": None, "high": None}
    path = {"points": [{"label": "PPO", "kl": 1.0, "gains": {"reward model": unknown}}]}
    (step,) = reward_quality.step_rows(path, ["reward model"])
    assert step["gains"] == ["+1.00"]


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        (0.0, "trained on none of the reward model's training pairs"),
        (0.5, "trained on 50.0\N{NO-BREAK SPACE}% of the reward model's"),
        (None, "is not known"),
    ],
)
def test_how_far_the_referee_stands(shared: float | None, words: str) -> None:
    found = reward_quality.referee_sentence(
        {"name": "r", "seed": 1, "part": "2/2", "shared": shared}
    )
    assert found.startswith("Referee: r, seed 1, part 2/2; ")
    assert words in found


def test_gains_start_at_nothing_and_go_by_the_root_of_kl() -> None:
    chart = reward_quality.gains_against_kl(content()["paths"][0])
    reward, referee = chart.lines
    assert reward.x.tolist() == [0.0, 2.0]
    assert (reward.y.tolist(), referee.y.tolist()) == ([0.0, 1.5], [0.0, 0.5])
    assert reward.whiskers is not None
    assert reward.whiskers[0].tolist() == [0.0, 1.25]


def test_accuracy_by_margin_beside_what_is_claimed() -> None:
    by_margin, curve = reward_quality.pair_charts([judge("reward model"), judge("gold judge")])
    measured, claimed = by_margin.lines
    assert measured.y.tolist() == [0.6, 0.8]
    assert claimed.y.tolist() == [0.55, 0.8]
    (line,) = curve.lines
    assert (line.x.tolist(), line.y.tolist()) == ([0.6], [0.7])


def test_the_section_is_escaped_and_complete() -> None:
    page = reward_quality.render(content())
    assert "<b>SFT" not in page
    assert "<i>other" not in page
    assert "&lt;b&gt;SFT&lt;/b&gt;" in page
    assert "&lt;i&gt;other&lt;/i&gt;" in page
    assert page.count("<figure") == 5
    assert "Of 10 pairs" in page
    assert "on 100 held-out prompts" in page


def test_without_pairs_and_without_a_referee() -> None:
    only = {"judges": ["reward model"], "referee": None, "pairs": [], "agreement": {}}
    answers = [{**content()["answers"][0], "judges_spearman": {}}]
    page = reward_quality.render(content(**only, answers=answers))
    assert "preference pairs" not in page
    assert "No referee judged" in page
    assert page.count("<figure") == 3


def printed(plain: dict[str, Any]) -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    reward_quality.print_reward_quality(plain, console)
    return file.getvalue().replace("\N{NO-BREAK SPACE}", " ")


def test_the_terminal_has_the_numbers_in_eighty_columns() -> None:
    best = {"label": "best of 4", "kl": 0.64, "gains": {"reward model": gain(0.95)}}
    published = {"label": "PPO", "kl": 9.0, "gains": {"reward model": gain(2.0)}}
    paths = [
        {"name": "best of n", "points": [best]},
        {"name": "PPO", "points": [published, *content()["paths"][0]["points"]]},
    ]
    text = printed(content(paths=paths))
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "Reward on 10 held-out pairs" in text
    (accuracy,) = (number for number, line in enumerate(lines) if "Accuracy  " in line)
    assert lines[accuracy].count("70.0 %") == 2
    assert lines[accuracy + 1].count("[34.8 %, 93.3 %]") == 2
    (of_four,) = (number for number, line in enumerate(lines) if "best of 4" in line)
    assert "0.64" in lines[of_four]
    assert "+0.95" in lines[of_four]
    assert "[+0.70, +1.20]" in lines[of_four + 1]
    assert any("PPO" in line and "+2.00" in line for line in lines)
    assert "step 96" not in text  # a snapshot; the report has it
    assert "Referee: <i>other</i>, seed 1" in " ".join(text.split())


def test_the_terminal_without_pairs_paths_or_referee() -> None:
    only = {"judges": ["reward model"], "referee": None, "pairs": [], "paths": []}
    assert printed(content(**only)) == ""


def test_names_do_not_steer_the_terminal() -> None:
    bad = "\x1b[2J[red]x[/red]"
    paths = [{"name": bad, "points": [{"label": bad, "kl": 1.0, "gains": {}}]}]
    text = printed(content(judges=[bad], pairs=[judge(bad)], paths=paths))
    assert "\x1b" not in text
    assert "[red]" in text
