"""The page of several runs: safe, whole, with the right lines in the right colours."""

from __future__ import annotations

import hashlib
import math
import re
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_exp.report.sweep.charts import Palette, best_of_n_frontier, curves, frontier
from rlhf_exp.report.sweep.data import Importance, RunPoint, Sweep
from rlhf_exp.report.sweep.page import render_sweep
from tests.report.sweep.lab import Lab, swept
from tests.report.sweep.test_gather import gathered

HOSTILE = "</script><script>alert(1)</script>\u202e"


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text[self.inside] = self.text.get(self.inside, "") + data


def digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


def point(number: int, **settings: str) -> RunPoint:
    rows = [
        {"global_step": step, "eval/reward_mean": step / 10, "eval/kl_sequence": kl}
        for step, kl in ((0, -0.5), (5, 1.0), (9, 4.0))
    ]
    return RunPoint("kl", f"k{number}", "done", (), settings, "", float(number), {}, rows)


def sweep(*points: RunPoint, **more: object) -> Sweep:
    varied = tuple(points[0].settings)
    return Sweep("kl", points, varied, "ppo", "reward", **more)  # type: ignore[arg-type]


def test_only_the_pages_own_script_and_style_may_act(tmp_path: Path) -> None:
    read = Reader(render_sweep(gathered(swept(tmp_path))))
    (policy,) = (a["content"] for t, a in read.tags if "http-equiv" in a)
    assert policy is not None
    assert f"script-src 'sha256-{digest(read.text['script'])}'" in policy
    assert f"style-src 'sha256-{digest(read.text['style'])}'" in policy
    assert policy.startswith("default-src 'none'")
    assert [tag for tag, _ in read.tags].count("script") == 1
    for _, attributes in read.tags:
        assert not {"src", "style", "onclick", "onerror"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")


def test_nothing_in_a_record_acts(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.point("a", 1.0, [f"ppo.note={HOSTILE}"], [(0, 1.0, 1.0)])
    lab.point("b", 2.0, ["ppo.note=other"], [(0, 1.0, 1.0)])
    lab.fail("c", [f"ppo.note={HOSTILE}x"], f"{HOSTILE}\nlast {HOSTILE}")
    page = render_sweep(gathered(lab))
    assert page.count("<script>") == 1
    assert "\u202e" not in page
    assert "last &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;⟨U+202E⟩" in page


def test_the_failure_the_best_and_the_reason_for_no_importance(tmp_path: Path) -> None:
    page = render_sweep(gathered(swept(tmp_path)))
    assert "Failed runs" in page
    assert "CUDA out of memory" in page
    assert "Traceback &lt;b&gt;" in page
    # By hand: 1e-4 has (1 + 2 + 6) / 3 = 3, 1e-3 has (4 + 5) / 2 = 4.5 of two seeds.
    assert "4.50 (4, 5), 2 seeds" in page
    assert "The next, lr 0.0001, has 3.00 [−3.57, 9.57]" in page
    assert "name=kl-best experiment=smoke ppo.lr=0.001" in page
    assert "ppo.seed" not in page.split('id="best"')[1].split("</section>")[0]
    assert "there is no Optuna study" in page


def test_each_table_says_how_to_sort_it(tmp_path: Path) -> None:
    page = render_sweep(gathered(swept(tmp_path)))
    runs = page.split('id="runs"')[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>", row) for row in runs.split("<tr>")[2:]]
    heads = re.findall(r"<th [^>]*>([^<]*)</th>", runs)
    column = heads.index("Objective")
    orders = [re.search(r'data-order="([^"]*)"', row[column])[1] for row in rows]  # type: ignore[index]
    assert orders == ["6.0", "5.0", "4.0", "2.0", "1.0", "NaN"]


def test_the_frontier_has_one_line_a_run_over_the_root_of_kl() -> None:
    found = sweep(point(0, lr="1", coef="0.1"), point(1, lr="2", coef="0.1"))
    chart = frontier(found, Palette(found))
    assert chart is not None
    assert len(chart.lines) == 2
    assert chart.lines[0].x.tolist() == [0.0, 1.0, 2.0]  # a KL below 0 is drawn as 0
    assert chart.lines[0].y.tolist() == [0.0, 0.5, 0.9]
    assert chart.lines[0].disc == 2
    budget = frontier(sweep(*found.points, kl_budget=2.0), Palette(found))
    assert budget is not None
    assert budget.marks_x == [(math.sqrt(2.0), "KL budget")]


def evaluated(number: int, best: float, **settings: str) -> RunPoint:
    metrics = {
        "eval best_of/1/kl": 0.0,
        "eval best_of/1/reward": 0.5,
        "eval best_of/16/kl": 1.84,
        "eval best_of/16/reward": best,
        "eval best_of/4/kl": 0.64,
        "eval best_of/4/reward": 1.5,
        "eval frontier/PPO/kl": 4.0,
        "eval frontier/PPO/reward": 1.0 + number,
        "eval frontier/PPO/over_best_of/reward": -0.25,
    }
    return replace(point(number, **settings), metrics=metrics)


def test_best_of_n_is_one_line_that_the_runs_are_points_beside() -> None:
    found = sweep(evaluated(0, 2.0, lr="1"), evaluated(1, 2.0, lr="2"), point(2, lr="3"))
    chart = best_of_n_frontier(found, Palette(found))
    assert chart is not None
    curve, first, second = chart.lines
    assert curve.label == "best of n"
    assert curve.x.tolist() == [0.0, 0.64**0.5, 1.84**0.5]
    assert curve.y.tolist() == [0.5, 1.5, 2.0]
    assert [line.x.tolist() + line.y.tolist() for line in (first, second)] == [[2.0, 1], [2.0, 2]]
    assert [line.label for line in (first, second)] == ["lr 1, PPO", "lr 2, PPO"]
    assert first.colour != second.colour != curve.colour
    assert [label for label, *_ in chart.keys or ()] == ["best of n", "lr 1", "lr 2", "lr 3"]
    page = render_sweep(found)
    assert 'id="best-of-n"' in page
    assert "PPO over best of n, test" in page
    # Another SFT policy or reward has a curve of its own.
    other = sweep(evaluated(0, 2.0, lr="1"), evaluated(1, 3.0, lr="2"))
    again = best_of_n_frontier(other, Palette(other))
    assert again is not None
    assert [line.label for line in again.lines[:2]] == ["best of n", "best of n, lr 2"]
    assert best_of_n_frontier(sweep(point(0)), Palette(sweep(point(0)))) is None


def test_twenty_runs_have_a_short_legend() -> None:
    points = [point(n, lr=str(10.0 ** -(n % 10)), coef=str(n // 10)) for n in range(20)]
    found = sweep(*points)
    palette = Palette(found)
    chart = frontier(found, palette)
    assert chart is not None
    assert len(chart.lines) == 20
    assert len(chart.keys or ()) <= 10
    # The objective is the number: coef, which splits 0 to 9 from 10 to 19, says most of it.
    assert palette.colour.key == "coef"
    assert {line.colour for line in chart.lines} == {0, 1}
    panels = [charts for title, charts in curves(found, palette) if title]
    assert all(len(charts) == 2 for charts in panels)
    assert len({chart.y_range for chart in panels[0]}) == 1


def test_importance_is_a_bar_for_each_hyperparameter() -> None:
    shares = (("ppo.lr", 0.75), ("ppo.kl.coef", 0.25))
    page = render_sweep(
        sweep(point(0, lr="1"), point(1, lr="2"), importance=Importance(60, shares))
    )
    section = page.split('id="importance"')[1].split("</section>")[0]
    assert re.findall(r'<rect [^>]*width="([^"]*)"', section) == ["75", "25"]
    assert "75 %" in section
    assert "60 complete trials" in section


@pytest.mark.parametrize(
    "points", [[point(0)], [RunPoint("a", "k", "running", (), {}, "", None, {})]]
)
def test_a_page_of_hardly_anything(points: list[RunPoint]) -> None:
    assert "Not shown" in render_sweep(sweep(*points, importance=Importance(0, reason="x")))
