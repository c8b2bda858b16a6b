"""The section on capability, from what its part leaves behind."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from rlhf_exp.report.run import harness


def content(**changes: Any) -> dict[str, Any]:
    task = {
        "task": "<b>sums</b>",
        "metric": "acc",
        "better": "higher",
        "documents": 1200,
        "paired": True,
        "values": {
            "SFT": {"mean": 0.75, "low": 0.7, "high": 0.8},
            "PPO": {"mean": 0.5, "low": 0.45, "high": 0.55},
        },
        "differences": {"PPO": {"mean": -0.25, "low": -0.3, "high": -0.2}},
    }
    other = {
        **task,
        "task": "text",
        "metric": "ppl",
        "better": "lower",
        "paired": False,
        "differences": {"PPO": {"mean": -0.25, "low": None, "high": None}},
    }
    plain: dict[str, Any] = {
        "models": ["SFT", "PPO"],
        "version": "0.4.13",
        "few_shot": None,
        "limit": 100,
        "chat_template": False,
        "tasks": [task, other],
    }
    return {**plain, **changes}


def test_the_section() -> None:
    page = harness.render(content())
    assert "&lt;b&gt;sums&lt;/b&gt;, acc" in page
    assert "1,200" in page
    assert '<span class="verdict-mark">worse</span>\N{MINUS SIGN}0.250' in page
    assert "text, ppl, lower is better" in page
    # Of a number without documents the difference has no interval, so no verdict either.
    assert page.count("verdict-mark") == 1
    assert "and none of the difference" in page
    assert "each task's own examples, at most 100 documents a task" in str(page).replace(
        "&#39;", "'"
    )
    assert "and none of the difference" not in harness.render(content(tasks=content()["tasks"][:1]))


def test_the_terminal() -> None:
    out = io.StringIO()
    plain = content(few_shot=5, limit=None, chat_template=True)
    harness.print_harness(plain, Console(file=out, width=100))
    text = out.getvalue()
    assert "Capability, lm-eval 0.4.13, 5 examples, in the chat template" in text
    assert "✗ \N{MINUS SIGN}0.250" in text
    assert "<b>sums</b>, acc" in text
