"""Importance from a study's journal."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rlhf_exp.report.sweep.importance import importance_of

LR = optuna.distributions.FloatDistribution(0.0, 1.0)


def test_what_the_objective_depends_on_matters_from_fifty_complete_trials_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the journal's, of which there are many
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = tmp_path / "study" / "journal.log"
    journal.parent.mkdir()
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )

    study.set_user_attr("about", {"objective": "reward_at_kl"})

    def trial(state: TrialState) -> None:
        asked = study.ask({"ppo.lr": LR, "ppo.kl.coef": LR})
        value = 3 * asked.params["ppo.lr"] if state is TrialState.COMPLETE else None
        study.tell(asked, value, state)

    for _ in range(49):
        trial(TrialState.COMPLETE)
    for _ in range(5):
        trial(TrialState.PRUNED)
    found = importance_of([tmp_path])
    assert (found.trials, found.shares) == (49, ())
    assert "49 complete trials" in found.reason
    assert "budget" in found.objective
    trial(TrialState.COMPLETE)
    # A worker may be writing its next line.
    content = journal.read_bytes() + b'{"op_code": 4, "wor'
    journal.write_bytes(content)
    found = importance_of([tmp_path])
    assert found.trials == 50
    assert [name for name, _ in found.shares] == ["ppo.lr", "ppo.kl.coef"]
    assert found.shares[0][1] > 0.9
    assert sum(share for _, share in found.shares) == pytest.approx(1.0)
    assert journal.read_bytes() == content


def test_without_a_study(tmp_path: Path) -> None:
    assert "no Optuna study" in importance_of([tmp_path]).reason
