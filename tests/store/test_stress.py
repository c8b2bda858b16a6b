"""The store under processes that use it all at once and are killed at any moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.store.test_publish import run


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_is_broken_or_lost(tmp_path: Path, rounds: int) -> None:
    said = run("stress.py", str(tmp_path), str(rounds), timeout=10 * rounds + 60)
    counts = json.loads(said.partition(":")[2])
    assert counts["kills"] >= 8 * rounds
    assert min(counts[what] for what in ("published", "read", "listed", "collected")) > rounds
