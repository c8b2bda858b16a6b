"""The tables over seeds, and the ablations' grip on the code that they replace."""

from __future__ import annotations

from pathlib import Path

import algorithms
import measured
import parity
import parity_ablations
import pytest
from algorithms import Outcome, Task
from measured import Usage
from parity import Run


def test_interval_over_seeds_is_students() -> None:
    # Mean 2, standard error sqrt(1 / 3) = 0.577; t with 2 degrees of freedom is 4.303.
    assert measured.mean_and_interval([1.0, 2.0, 3.0]) == "2.00 (-0.48 to 4.48)"


def test_differences_are_taken_within_a_seed() -> None:
    ours = [Run([0, 1], [0.0, reward], [0.0, 1.0], 10.0, 100.0) for reward in (1.0, 5.0, 9.0)]
    other = [Run([0, 1], [0.0, reward], [0.0, 3.0], 20.0, 300.0) for reward in (2.0, 6.0, 10.0)]
    *_, line = parity.table("engine", {"native": ours, "trlx": other}, "native").splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "6.00 (-3.94 to 15.94)"
    assert cells[3] == "1.00 (1.00 to 1.00)"
    assert cells[5:] == ["2.00 (2.00 to 2.00)", "20", "300"]


def test_picture_has_both_engines() -> None:
    runs = [Run([0, 16], [0.0, value], [0.0, value], 1.0, 1.0) for value in (0.1, 0.2, 0.3)]
    drawn = parity.picture({"native": runs, "trlx": runs})
    assert drawn.count("trlx") >= 2
    assert "KL to SFT, nats" in drawn


def test_failed_run_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="failed: see the end of"):
        measured.run_measured(["-c", "raise SystemExit(3)"], tmp_path / "log.txt")


def test_measured_run_counts_its_processor_time(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    usage = measured.run_measured(["-c", busy], tmp_path / "log.txt")
    assert 0.3 <= usage.processor_s < 3
    assert usage.peak_mib > 1


@pytest.mark.parametrize("name", parity_ablations.ABLATIONS)
def test_ablation_replaces_what_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []

    def record(owner: object, attribute: str, value: object) -> None:
        assert callable(getattr(owner, attribute))
        assert callable(value)
        replaced.append(attribute)

    monkeypatch.setattr(parity_ablations, "replace_in", record)
    parity_ablations.ABLATIONS[name]()
    assert replaced


def test_every_ablation_has_its_settings() -> None:
    assert set(parity.SETTINGS) == set(parity_ablations.ABLATIONS)


def test_algorithms_are_beside_sft_and_best_of_n() -> None:
    policy = {
        "eval/reward/a": 0.0,
        "eval/reward/b": 1.5,
        "eval/gold/a": 0.25,
        "eval/gold/b": 0.5,
        "eval/kl_sequence/b": 4.0,
    }
    best = {f"best_of/{n}/{key}": n for n in (1, 2, 4, 8, 16) for key in ("reward", "gold")}
    best |= {f"best_of/{n}/kl": n / 8 for n in (1, 2, 4, 8, 16)}
    outcomes = {
        "ppo": [Outcome(policy, 64000.0, Usage(70.0, 500.0))] * 2,
        "best_of": [Outcome(best, usage=Usage(9.0, 400.0))] * 2,
    }
    task = Task(("experiment=demo",), "gold", "gold judge")
    lines = algorithms.table(algorithms.lines_of(outcomes, task), task, 2).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["SFT", "ppo", "best of 16"]
    ppo = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert ppo[4:] == ["64 k", "70", "500"]
    assert ppo[1].startswith("1.50 ")
    assert lines[4].split("|")[4].strip() == "2.00"
    chart = algorithms.frontier(outcomes, "gold", "toy")
    assert [line.label for line in chart.lines] == ["ppo", "best of n"]
    assert (list(chart.lines[0].x), list(chart.lines[0].y)) == ([2.0], [0.5])
