"""The page: complete, self-contained, and deaf to what its texts would like it to do.

Answers side by side, by rule.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_exp.evaluation.comparison import ModelComparison, compare_models
from rlhf_exp.report.run.data import CalibrationBar, ReportData, Sample, SampleSide, StageRow
from rlhf_exp.report.run.page import (
    build_report,
    config_sections,
    render_page,
    sample_rule_of,
    samples_of,
)

Compare = Callable[..., ModelComparison]

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></style></title><style>body{display:none}</style>",
    "\u202egnp.exe\u202c",
    "\" ' onmouseover=alert(1) x='",
    "{{ 7*7 }}{% raw %}",
    "\x1b[31m\x00\ud800",
    "javascript:alert(1)",
    "]]><!-- & &amp; -->",
    "B" * 100_000,
]


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def example(compare: Compare, **changes: Any) -> ReportData:
    steps = range(4, 44, 4)
    values: dict[str, Any] = {
        "title": "demo, seed 0",
        "overview": [("Model", "tiny"), ("Published by PPO", "step 12 of 40")],
        "identity": [("Key", "3fa90c11"), ("Git revision", "0d6339c")],
        "config": {"seed": 7, "ppo": {"lr": 1e-4, "kl": {"coef": 0.05}}, "out": Path("outputs")},
        "data_facts": [("Rows rejected", "3 of 900")],
        "stages": [StageRow("ppo", "3fa90c11", False, 125.0, 427_520, "reward 1.2", 12, 40)],
        "metrics": {
            "sft": [{"global_step": s, "loss/total": 3 / s} for s in steps],
            "reward": [{"global_step": s, "eval/accuracy": 0.7} for s in steps],
            "ppo": [{"global_step": s, "reward/mean": s, "kl/sequence": s} for s in steps],
        },
        "evaluation": compare().to_json(),
        "calibration": [CalibrationBar(0.6, 0.6, 20)],
        "usage": [("Load it", "model = load('x')")],
        "warnings": ["11 prompts were cut"],
    }
    return ReportData(**(values | changes))


def test_everything_is_on_the_page(compare: Compare, tmp_path: Path) -> None:
    path = build_report(example(compare), tmp_path / "new" / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    for expected in [
        "demo, seed 0",
        "3fa90c11",
        "coef: 0.05",
        "out: outputs",
        "3 of 900",
        "2 min 05 s",
        "428k",
        "30 wins",
        "The reward model names no clear winner: PPO 30, SFT 16.",
        "No independent judge",
        "p = 0.054",
        "0.280",
        "Reward against KL",
        "Reward model: calibration",
        "largest gain",
        "Question 0?",
        "Answer 0.",
        "3 largest gains",
        "model = load('x')",
        "11 prompts were cut",
        "loss/total",
    ]:
        assert expected in page.text, expected
    assert page.tags.count("figure") == 6
    # The answer first, versions and keys last.
    order = ["demo, seed 0", "names no clear winner", "step 12 of 40", "11 prompts were cut"]
    order += ["Reward against KL", "loss/total", "0d6339c"]
    places = [page.text.index(text) for text in order]
    assert places == sorted(places)


def test_the_published_checkpoint_is_marked_on_each_curve(compare: Compare) -> None:
    html = render_page(example(compare))
    figures = {
        re.search(r"<figcaption>(.*?)</figcaption>", text)[1]: text  # type: ignore[index]
        for text in re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    }
    marked = {title for title, text in figures.items() if ">published</text>" in text}
    assert marked == {"Reward", "KL, nats per answer", "Reward against KL"}  # PPO's own
    # Steps 4 to 40 lie between x = 44 and x = 328: step 12 at 44 + 284 * 8 / 36 = 107.11.
    assert '<line x1="107.11" x2="107.11"' in figures["Reward"]


def test_the_page_needs_nothing_from_anywhere(compare: Compare) -> None:
    html = render_page(example(compare))
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base"} & set(
        page.tags
    )
    loading = {"src", "srcset", "data", "action", "formaction", "poster", "background", "ping"}
    for tag, name, value in page.attributes:
        assert name not in loading, (tag, name)
        assert not name.startswith("on"), (tag, name)
        assert name != "style", tag
        if "href" in name:
            assert value.startswith("#"), (tag, value)
    assert "url(" not in html
    assert "@import" not in html


def test_runs_at_wandb_are_linked(compare: Compare) -> None:
    url = "https://wandb.example/me/rlhf/runs/ab12?x=1&y=<b>"
    stages = [StageRow("ppo", "3fa90c11", False, url=url), StageRow("eval", "77", False)]
    page = Page(render_page(example(compare, stages=stages)))
    links = [value for _, name, value in page.attributes if name == "href"]
    assert [link for link in links if not link.startswith("#")] == [url]


def test_the_policy_allows_this_style_sheet_and_nothing_else(compare: Compare) -> None:
    html = render_page(example(compare))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    (css,) = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert html.index("Content-Security-Policy") < html.index("<style>")


def hostile_data(compare: Compare) -> ReportData:
    bad = HOSTILE
    short = [text[:300] for text in bad]
    count = len(bad)
    result = compare(
        count, 0, 0, name_a=bad[0], name_b=bad[1], prompts=bad, answers=list(reversed(bad))
    )
    side = [SampleSide(name, text, [(name, name)]) for name, text in zip(short, bad, strict=True)]
    return example(
        compare,
        title=bad[2],
        identity=list(zip(bad, bad, strict=True)),
        config={text: {text: text, "list": [text]} for text in bad} | {"one": bad[3]},
        data_facts=list(zip(bad, bad, strict=True)),
        stages=[StageRow(text, text, True, 1.0, 1, text) for text in bad],
        metrics={text: [{"global_step": 1, **dict.fromkeys(bad, 1.0)}] for text in bad},
        evaluation=result.to_json(),
        samples=[Sample(text, text, side) for text in short],
        sample_rule=bad[0],
        usage=list(zip(bad, bad, strict=True)),
        warnings=bad,
    )


def test_hostile_text_is_text(compare: Compare, tmp_path: Path) -> None:
    harmless = Page(render_page(example(compare)))
    path = build_report(hostile_data(compare), tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert set(page.tags) <= set(harmless.tags) | {"p"}
    assert page.tags.count("style") == 1
    names = {(tag, name) for tag, name, _ in page.attributes}
    assert not {name for _, name in names if name.startswith("on") or name in ("src", "style")}
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "⟨U+202E⟩gnp.exe⟨U+202C⟩" in page.text
    assert "{{ 7*7 }}{% raw %}" in page.text
    assert "49" not in [piece.strip() for piece in page.pieces]
    assert "\u241b[31m\u2400⟨U+D800⟩" in page.text
    assert not set("\u202e\u202c\x1b\x00") & set(html)
    assert "92,000 more characters not shown" in page.text  # of the answer of 100 kB
    assert len(html) < 5_000_000


def test_a_page_of_almost_nothing(tmp_path: Path) -> None:
    path = build_report(ReportData("empty", [], {}), tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "empty" in page.text
    assert "table" not in page.tags
    assert "figure" not in page.tags


def test_given_samples_replace_the_picks(compare: Compare) -> None:
    given = [Sample("by seed", "Hello", [SampleSide("base", ""), SampleSide("tuned", "Hi!")])]
    page = Page(render_page(example(compare, samples=given, sample_rule="One of one.")))
    assert "One of one." in page.text
    assert "largest gain" not in page.text
    assert "(empty answer)" in page.text


def test_a_page_is_replaced_whole_or_not_at_all(compare: Compare, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    broken = example(compare, evaluation={"not": "a result"})
    with pytest.raises(KeyError):
        build_report(broken, path)
    assert path.read_text() == "old"
    with path.open() as reader:  # has the page open while it is made anew
        build_report(example(compare), path)
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_config_sections_gather_single_values_first() -> None:
    sections = config_sections({"ppo": {"lr": 1e-4}, "seed": 0, "name": None})
    assert sections == [("general", "seed: 0\nname: null\n"), ("ppo", "lr: 0.0001\n")]


@pytest.mark.browser
def test_a_real_browser_finds_no_element_in_hostile_text(compare: Compare, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("Chromium is not installed")
    path = build_report(hostile_data(compare), tmp_path / "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *flags, profile, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = Page(done.stdout)
    assert "⟨U+202E⟩gnp.exe⟨U+202C⟩" in page.text
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("style") == 1


def test_samples_are_the_picks(compare: Compare) -> None:
    result = compare()
    samples = samples_of([result])
    assert [sample.rule for sample in samples] == [pick.rule for pick in result.picks]
    first = result.rows[result.picks[0].row]
    assert samples[0].prompt == first.prompt
    assert samples[0].sides[0].text == first.answer_a
    assert dict(samples[0].sides[1].facts) == {
        "reward": f"{first.score_b:.2f}".replace("-", "\u2212"),
        "KL": "3.00",
        "outcome": "win",
    }
    assert sample_rule_of([result]) == result.pick_rule


def against(name: str, gains: dict[int, float]) -> ModelComparison:
    """Compare a model with the baseline on 40 prompts; 0 gain where nothing is said."""
    base = np.arange(40.0)
    scores = base + [gains.get(row, 0.0) for row in range(40)]
    prompts = [f"Question {row}" for row in range(40)]
    said = [[f"{who} to {row}" for row in range(40)] for who in ("SFT", name)]
    return compare_models(prompts, *said, base, scores, name_b=name)


def chosen(samples: list[Sample]) -> dict[int, str]:
    return {int(sample.prompt.removeprefix("Question ")): sample.rule for sample in samples}


def test_all_models_answer_each_prompt_that_any_comparison_picked() -> None:
    results = [
        against("PPO", {3: 5.0, 7: -2.0, 5: 1.0}),
        against("third", {7: 4.0, 9: -1.0, 5: 1.0}),
    ]
    samples = samples_of(results)
    rules = chosen(samples)
    assert rules[3].startswith("largest gain: PPO")
    assert rules[7] == "largest loss: PPO; largest gain: third"
    assert rules[5] == "largest gain: PPO, third"
    assert rules[9].startswith("largest loss: third")
    picked = {pick.row for result in results for pick in result.picks}
    assert len(samples) == len(rules) == len(picked)
    for row, sample in zip(rules, samples, strict=True):
        assert [side.name for side in sample.sides] == ["SFT", "PPO", "third"]
        expected = [f"{who} to {row}" for who in ("SFT", "PPO", "third")]
        assert [side.text for side in sample.sides] == expected
    by_name = {side.name: dict(side.facts) for side in samples[list(rules).index(7)].sides}
    assert by_name["SFT"]["reward"] == "7.00"
    assert (by_name["PPO"]["reward"], by_name["PPO"]["outcome"]) == ("5.00", "loss")
    assert (by_name["third"]["reward"], by_name["third"]["outcome"]) == ("11.00", "win")


def test_the_page_shows_them_and_says_the_rule() -> None:
    results = [against("PPO", {3: 5.0}), against("third", {9: 1.0})]
    plain: list[dict[str, Any]] = [result.to_json() for result in results]
    parts = {"comparisons.json": plain}
    page = render_page(ReportData("three", [], {}, evaluation=plain[0], parts=parts))
    samples = page.partition('id="samples"')[2]
    assert "the 3 largest gains in reward" in samples
    assert "This for each model against SFT: PPO, third." in samples
    assert "third to 3" in samples
    assert "PPO to 9" in samples
    alone = render_page(ReportData("two", [], {}, evaluation=plain[0]))
    assert "third to" not in alone
