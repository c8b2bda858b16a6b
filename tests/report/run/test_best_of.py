"""The section on best-of-n, from what its part leaves behind."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from rlhf_exp.report.run import best_of

MINUS = "\N{MINUS SIGN}"


def estimate(mean: float, half: float = 0.25) -> dict[str, float | None]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def point(n: int, kl: float, reward: float) -> dict[str, Any]:
    values = {"reward": estimate(reward), "length": estimate(20.0)}
    return {"n": n, "kl": kl, "values": values, "gains": values}


def model(name: str, lead: float, beyond: bool = False) -> dict[str, Any]:
    values = {"reward": estimate(1.5), "length": estimate(30.0)}
    return {
        "name": name,
        "kl": estimate(4.0, 0.5),
        "values": values,
        "over": {"reward": estimate(lead)},
        "beyond": beyond,
    }


def content(*models: dict[str, Any]) -> dict[str, Any]:
    return {
        "baseline": "<b>SFT</b>",
        "judge": "reward model",
        "samples": 16,
        "prompts": 100,
        "distinct": 0.94,
        "sampling": "up to 32 tokens at temperature 1",
        "measures": [
            {"key": "reward", "label": "Reward, raw", "better": "higher"},
            {"key": "length", "label": "Length, tokens", "better": "neither"},
        ],
        "points": [point(1, 0.0, 0.5), point(16, 1.84, 2.0)],
        "models": list(models),
    }


def test_where_a_model_stands_to_the_curve() -> None:
    plain = content()
    sentences = [
        best_of.lead_sentence(model("PPO", lead, beyond), plain)
        for lead, beyond in ((-0.5, False), (0.5, False), (0.1, False), (-0.5, True))
    ]
    assert sentences == [
        f"PPO is below best of n at the same KL: {MINUS}0.500 [{MINUS}0.750, {MINUS}0.250] of "
        "reward.",
        "PPO is above best of n at the same KL: +0.500 [+0.250, +0.750] of reward.",
        f"PPO is level with best of n at the same KL: +0.100 [{MINUS}0.150, +0.350] of reward.",
        f"PPO is below best of 16, which costs less KL: {MINUS}0.500 [{MINUS}0.750, "
        f"{MINUS}0.250] of reward.",
    ]


def test_the_curve_and_the_models_go_by_the_root_of_kl() -> None:
    (chart,) = best_of.frontier_charts(content(model("PPO", 0.1)))
    curve, ppo = chart.lines
    assert curve.x.tolist() == [0.0, 1.84**0.5]
    assert curve.y.tolist() == [0.5, 2.0]
    assert curve.whiskers is not None
    assert curve.whiskers[1].tolist() == [0.75, 2.25]
    assert (ppo.label, ppo.x.tolist(), ppo.y.tolist()) == ("PPO", [2.0], [1.5])


def test_the_section_has_every_row_and_no_markup_of_a_name() -> None:
    page = best_of.render(content(model("<i>PPO</i>", -0.5)))
    assert "<i>" not in page
    assert "&lt;b&gt;SFT&lt;/b&gt; answers each of 100 held-out prompts 16 times" in page
    for words in ("one answer", "best of 16", "&lt;i&gt;PPO&lt;/i&gt; is below best of n"):
        assert words in page
    assert "94\N{NO-BREAK SPACE}% of a prompt" in page


def test_the_terminal_has_the_same_rows() -> None:
    out = io.StringIO()
    best_of.print_best_of(content(model("[red]PPO", 0.5)), Console(file=out, width=100))
    text = out.getvalue()
    assert "Best of n by the reward model, 100 prompts" in text
    for words in ("one answer", "best of 16", "[red]PPO", "4.00", "[1.75,"):
        assert words in text
    assert "[red]PPO is above best of n at the same KL: +0.500" in text
