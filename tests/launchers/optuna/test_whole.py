"""A study with real PPO, from the command line to the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.pipeline.plan import records_of
from rlhf_exp.store.store import Store
from tests.lab import launch, small_config
from tests.launchers.optuna.lab import states


@pytest.mark.slow
def test_a_study_from_the_command_line(run_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("-m", "sweep=ppo_optuna", "name=tpe", "study.finalists=1", "ppo.lam=0.9")
    pruning = ("study.prune_after=1", "study.warmup=0")
    assert launch(run_copy, *arguments, *pruning, "study.trials=2") == 0
    assert launch(run_copy, *arguments, *pruning, "study.trials=5") == 0
    told = capfd.readouterr().out
    ended = states(run_copy)
    assert len(ended) == 5
    assert set(ended) <= {"COMPLETE", "PRUNED"}
    records = records_of(small_config(run_copy)).sweep("tpe")
    tested = [record for record in records if "eval" in record.keys]
    assert 1 <= len(tested) <= 4, "the best of each command, and the config's own values"
    published = [record for record in records if record.stage == "ppo"]
    store = Store(run_copy / "store")
    for record in published:
        found = store.lookup("ppo", record.keys["ppo"])
        assert (found is not None) == (record.status == "done")
        if found is not None:
            # The weights that a trial publishes are those that its objective is of.
            assert found.manifest.metrics["eval/reward_mean"] == pytest.approx(record.objective)
            assert found.manifest.metrics["eval/kl_sequence"] <= 10.0
    assert "study tpe: 5 of 5 trials" in told
    line = next(text for text in told.splitlines() if "launch.py name=tpe-best" in text)
    again = [text for text in line.split() if "=" in text][1:]
    before = {one.key for one in store.find("ppo/")}
    assert launch(run_copy, "name=best", "stage=ppo", *again) == 0
    assert {one.key for one in store.find("ppo/")} == before, "it is in the store already"
