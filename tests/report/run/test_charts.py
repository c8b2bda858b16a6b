"""Which charts a run's metrics give.

Charts as SVG files of their own.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_exp.cli import main
from rlhf_exp.report.chart import WIDTH
from rlhf_exp.report.run.charts import (
    charts_of,
    ppo_charts,
    reward_charts,
    sft_charts,
    sheet,
    write_sheets,
)
from rlhf_exp.report.run.data import CalibrationBar

PPO = [
    {
        "global_step": step,
        "reward/mean": 0.1 * step,
        "reward/std": 1.0,
        "kl/k1": 0.1,
        "kl/k3": 0.2,
        "kl/sequence": 3.0 * step,
        "kl/beta": 0.05,
        "policy/entropy": 2.0,
        "policy/clip_fraction": 0.1,
        "value/explained_variance": 0.5,
        "response/length_mean": 30.0,
        "response/eos_fraction": 0.9,
    }
    for step in (4, 8, 12)
] + [{"global_step": 0, "eval/reward_mean": -0.3, "eval/kl_sequence": 0.5, "eval/length_mean": 7.0}]


def test_ppo_has_all_charts_of_its_contract() -> None:
    charts = {chart.title: chart for chart in ppo_charts(PPO, kl_target=6.0)}
    assert list(charts) == [
        "Reward",
        "KL, nats per answer",
        "Reward against KL",
        "KL, nats per token",
        "KL coefficient β",
        "Entropy, nats per token",
        "Answer length, tokens",
        "Value: explained variance",
        "Shares of answers and updates",
    ]
    reward = charts["Reward"].lines
    assert [line.label for line in reward] == ["rollouts, mean ± std", "held-out prompts"]
    assert reward[0].spread is not None
    assert list(reward[0].spread) == [1.0, 1.0, 1.0]
    assert list(charts["KL, nats per answer"].levels) == [(6.0, "target")]
    for title, held_out in [("KL, nats per answer", 0.5), ("Answer length, tokens", 7.0)]:
        assert [line.label for line in charts[title].lines] == ["rollouts", "held-out prompts"]
        assert list(charts[title].lines[1].y) == [held_out]
    path = charts["Reward against KL"].lines[0]
    assert path.ordered
    assert list(path.x) == [12.0, 24.0, 36.0]  # KL
    assert list(path.y) == pytest.approx([0.4, 0.8, 1.2])  # reward
    assert [line.label for line in charts["KL, nats per token"].lines] == ["k1", "k3"]


def test_sft_and_reward_model_have_training_and_validation() -> None:
    rows = [
        {"global_step": 1, "loss/total": 3.0, "reward/accuracy": 0.5},
        {"global_step": 2, "eval/loss": 2.0, "eval/accuracy": 0.7},
    ]
    (loss,) = sft_charts(rows)
    assert [(line.label, line.y[0]) for line in loss.lines] == [("train", 3.0), ("validation", 2.0)]
    _, accuracy = reward_charts(rows)
    assert [(line.label, line.y[0]) for line in accuracy.lines] == [
        ("train", 0.5),
        ("validation", 0.7),
    ]
    assert list(accuracy.levels) == [(0.5, "chance")]


def test_calibration_has_exact_intervals() -> None:
    bins = [CalibrationBar(0.9, 0.8, 10), CalibrationBar(0.6, 0.5, 46), CalibrationBar(0.7, 1, 0)]
    (chart,) = reward_charts([], bins)
    (line,) = chart.lines
    assert list(line.x) == [0.6, 0.9]  # sorted, the empty bin left out
    assert line.whiskers is not None
    low, high = line.whiskers
    # 8 of 10: 0.4439 to 0.9748 in published tables of the exact interval.
    assert (low[1], high[1]) == pytest.approx((0.4439, 0.9748), abs=1e-4)
    assert np.all(low < line.y)
    assert chart.diagonal
    assert line.ending == "56 pairs"


def test_what_was_not_logged_has_no_chart() -> None:
    assert charts_of({}) == []
    assert charts_of({"ppo": [{"global_step": 1}], "sft": []}) == []
    groups = charts_of({"ppo": [{"global_step": 1, "reward/mean": 1.0}], "eval": [{"x": 1.0}]})
    assert [(title, [c.title for c in charts]) for title, charts in groups] == [("PPO", ["Reward"])]


SVG = "{http://www.w3.org/2000/svg}"
ROWS = [
    {
        "global_step": step,
        "reward/mean": step / 10,
        "eval/reward_mean": step / 20,
        "kl/sequence": 1.0,
    }
    for step in range(5)
]


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(found.itertext()) for found in root.iter(f"{SVG}text")]


def test_a_sheet_needs_nothing_else() -> None:
    charts = ppo_charts(ROWS, kl_target=2.0)
    drawing = sheet(charts)
    root = ElementTree.fromstring(drawing)
    assert {chart.title for chart in charts} <= set(texts(root))
    assert "held-out prompts 0.2" in " ".join(texts(root))
    rules = root.find(f"{SVG}style").text  # type: ignore[union-attr]
    assert rules is not None
    assert "var(" not in drawing
    assert "#0b6bb5" in rules  # the first colour of the page, on white
    for where in ("http:", "url(", "@import"):
        assert where not in rules
    # Two rows of three columns at most: none lies beside the sheet.
    assert float(root.get("width", 0)) == 3 * (WIDTH + 20) + 20


def test_names_of_lines_stay_in_their_column() -> None:
    for cell in ElementTree.fromstring(sheet(ppo_charts(ROWS))).findall(f"{SVG}g"):
        for name in cell.findall(f"{SVG}text"):
            letters = len("".join(name.itertext()))
            assert float(name.get("x", 0)) + 6.5 * letters < WIDTH + 20, "".join(name.itertext())


def test_files_by_stage(tmp_path: Path) -> None:
    sft = [{"global_step": 1, "loss/total": 2.0}, {"global_step": 2, "loss/total": 1.0}]
    found = write_sheets({"sft": sft, "reward": [], "ppo": ROWS}, tmp_path / "new")
    assert [path.name for path in found] == ["sft.svg", "ppo.svg"]


def test_of_a_run(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--outputs", str(small_run), "figures", "small", str(tmp_path)]
    assert main(arguments) == 0
    names = [f"{stage}.svg" for stage in ("sft", "reward", "ppo")]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    for name in names:
        ElementTree.parse(tmp_path / name)
