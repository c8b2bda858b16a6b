"""Charts as SVG files of their own."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from rlhf_exp.cli import main
from rlhf_exp.report.chart import WIDTH
from rlhf_exp.report.charts import ppo_charts
from rlhf_exp.report.figures import sheet, write_sheets

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
