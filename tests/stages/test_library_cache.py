"""Runs that sample with the library's cache: everywhere, and with the answers that slots give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.rollout import decoder
from tests.lab import run

ARGUMENTS = ("stage=pipeline", "eval.suite=quick", "ppo.steps=2", "ppo.train_blocks=1")


def metrics(path: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("reward/mean", "response/length_mean", "eval/reward_mean", "eval/kl_sequence")
    return [{name: row[name] for name in names if name in row} for row in rows]


def test_every_part_of_a_run_samples_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, *ARGUMENTS)
    (slots,) = (tmp_path / "store" / "ppo").glob("*/metrics.jsonl")

    def refused(*arguments: object) -> None:
        raise AssertionError("sampled with slots")

    monkeypatch.setattr(decoder, "SlotCache", refused)
    run(tmp_path, *ARGUMENTS, "model.cache=library")
    for stage, count in (("sft", 1), ("reward", 1), ("ppo", 2), ("eval", 2)):
        assert len(list((tmp_path / "store" / stage).glob("*/manifest.json"))) == count, stage
    (library,) = set((tmp_path / "store" / "ppo").glob("*/metrics.jsonl")) - {slots}
    expected, found = metrics(slots), metrics(library)
    assert any(expected)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
