"""The tables of estimates, and that the page has those of today."""

from __future__ import annotations

import re
from pathlib import Path

import estimates
import pytest
from estimates import BEGIN, END, H200, Gpu

from rlhf_exp.models.time_estimate import Work

PAGE = Path(__file__).resolve().parents[2] / "docs" / "background" / "benchmarks.md"


def test_a_part_takes_what_it_reaches_of_its_limit() -> None:
    gpu = Gpu("G", flops=100.0, bandwidth=10.0)
    # Decoding: 12 bytes at 10 a second, 60 %: 2 s. A pass: 40 at 100 a second, 40 %: 1 s.
    parts = {"decode": Work(10.0, 12.0), "forward": Work(40.0, 1.0)}
    assert estimates.seconds(parts, gpu, reached=True) == pytest.approx(3.0)
    assert estimates.seconds(parts, gpu, reached=False) == pytest.approx(1.6)


def test_decoding_gptj_by_hand() -> None:
    # 28 blocks of 201 355 264 parameters, a head of 206 438 400; 64 x 512 tokens of 2 * 28 * 4096
    # numbers, 2 bytes each: 11.69 + 15.03 = 26.7 GB, 6.2 ms at 4.3 TB/s.
    row = next(
        line
        for line in estimates.decode_table().splitlines()
        if "GPT-J 6B, 64" in line and H200.name in line
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:4] == ["26.7", "6.2"]


def test_the_page_has_the_tables_of_today() -> None:
    found = re.search(f"{BEGIN}\n(.*?){END}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    again = "python benchmarks/estimates.py --write docs/background/benchmarks.md"
    assert found[1] == estimates.tables(), again
