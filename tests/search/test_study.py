"""The study that workers share, with a quadratic instead of PPO."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.search import lab


def states(study: lab.Search) -> list[TrialState]:
    return [trial.state for trial in study.study.get_trials()]


def test_the_first_trial_has_the_values_of_the_config(tmp_path: Path) -> None:
    with lab.search(tmp_path, 3).ask() as asked:
        assert asked is not None
        assert asked.values == {"ppo.lr": 1e-3, "ppo.epochs": 4}


def test_a_study_goes_on_to_its_number_and_finds_the_hill(tmp_path: Path) -> None:
    assert lab.play_all(lab.search(tmp_path, 6)) == 6
    assert lab.play_all(lab.search(tmp_path, 6)) == 0
    study = lab.search(tmp_path, 30)
    assert lab.play_all(study) == 24
    assert states(study) == [TrialState.COMPLETE] * 30
    best = study.study.best_trial
    # Within a factor of 3 of the top, where the reward is above 5/6 (1 - 0.25 * 0.23) = 0.78.
    assert abs(math.log10(best.params["ppo.lr"] / lab.BEST)) < 0.5
    assert best.value == pytest.approx(lab.reward(best.params, 5), abs=0.2)
    assert best.value > 0.75


def test_the_same_seed_tries_the_same_values_and_another_one_others(tmp_path: Path) -> None:
    tried = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        study = lab.search(tmp_path / name, 8, seed=seed)
        lab.play_all(study)
        tried.append([trial.params for trial in study.study.get_trials()])
    assert tried[0] == tried[1]
    assert tried[0][1:] != tried[2][1:]


def test_a_failed_trial_and_one_without_a_number_are_kept_and_the_study_goes_on(
    tmp_path: Path,
) -> None:
    study = lab.search(tmp_path, 4)
    with study.ask() as asked:
        assert asked is not None
        asked.fail("out of memory")
    with study.ask() as asked:
        assert asked is not None
        assert not asked.complete(math.nan)
    assert lab.play_all(study) == 2
    assert states(study) == [TrialState.FAIL] * 2 + [TrialState.COMPLETE] * 2
    errors = [trial.user_attrs.get("error") for trial in study.study.get_trials()]
    assert errors == ["out of memory", "the objective is nan", None, None]


def test_an_interrupted_trial_comes_next_with_the_same_values(tmp_path: Path) -> None:
    study = lab.search(tmp_path, 3)
    lab_values = []
    for _ in range(2):
        with study.ask() as asked:
            assert asked is not None
            lab_values.append(asked.values)
            lab.play(study, asked) if len(lab_values) == 1 else asked.requeue()
    with lab.search(tmp_path, 3).ask() as asked:
        assert asked is not None
        assert asked.values == lab_values[1]
        lab.play(study, asked)
    assert lab.play_all(study) == 1
    assert states(study).count(TrialState.COMPLETE) == 3


def _die_in_a_trial(folder: Path) -> None:
    with lab.search(folder, 3).ask():
        os.kill(os.getpid(), signal.SIGKILL)


def _killed(folder: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_in_a_trial, args=(folder,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_workers_trial_is_tried_again_and_given_up_after_the_third(tmp_path: Path) -> None:
    _killed(tmp_path)
    study = lab.search(tmp_path, 3)
    assert states(study) == [TrialState.RUNNING]
    with study.ask() as asked:
        assert asked is not None
        assert asked.values == {"ppo.lr": 1e-3, "ppo.epochs": 4}
        asked.requeue()
    _killed(tmp_path)
    _killed(tmp_path)
    assert study.running() == 0
    last = study.study.get_trials()[-1]
    assert last.state is TrialState.FAIL
    assert last.user_attrs["error"] == "its worker died 3 times without getting any further"
    # It counts as one of the three.
    assert lab.play_all(study) == 2


def test_a_trial_that_another_worker_runs_is_not_taken(tmp_path: Path) -> None:
    first, second = lab.search(tmp_path, 2), lab.search(tmp_path, 2, worker=1)
    with first.ask() as one, second.ask() as other:
        assert one is not None
        assert other is not None
        assert (one.number, other.number) == (0, 1)
        assert one.values != other.values
        with first.ask() as third:
            assert third is None
        assert first.running() == 2


def _work(folder: Path, worker: int, both: Barrier) -> None:
    study = lab.search(folder, 12, worker=worker)
    with study.ask() as asked:
        assert asked is not None
        # Each holds a trial before any goes on: neither can have done all of them first.
        both.wait(60)
        lab.play(study, asked)
    lab.play_all(study)


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = context.Barrier(2)
    workers = [context.Process(target=_work, args=(tmp_path, number, both)) for number in range(2)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(120)
        assert one.exitcode == 0
    study = lab.search(tmp_path, 12)
    assert states(study) == [TrialState.COMPLETE] * 12
    assert len({trial.user_attrs["worker"] for trial in study.study.get_trials()}) == 2
    assert len({str(trial.params) for trial in study.study.get_trials()}) == 12


def test_the_same_trials_are_pruned_as_by_optunas_own_loop(tmp_path: Path) -> None:
    study = lab.search(tmp_path, 14, rule="median")
    lab.play_all(study)
    ours = study.study.get_trials()

    def objective(trial: optuna.Trial) -> float:
        values = dict(ours[trial.number].params)
        trial.suggest_float("ppo.lr", values["ppo.lr"], values["ppo.lr"])
        best = -math.inf
        for step in range(lab.STEPS + 1):
            if step <= 5:  # the budget of KL
                best = max(best, lab.reward(values, step))
            trial.report(best, step)
            if step < lab.STEPS and trial.should_prune():
                raise optuna.TrialPruned
        return best

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=2)
    theirs = optuna.create_study(direction="maximize", pruner=pruner)
    theirs.optimize(objective, n_trials=14)
    assert [one.state for one in ours] == [one.state for one in theirs.get_trials()]
    assert [one.value for one in ours] == pytest.approx([one.value for one in theirs.get_trials()])
    assert 0 < [one.state for one in ours].count(TrialState.PRUNED) < 12


def test_a_line_that_a_writer_did_not_finish_is_removed(tmp_path: Path) -> None:
    lab.play_all(lab.search(tmp_path, 2))
    journal = tmp_path / "study" / "journal.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    assert lab.play_all(lab.search(tmp_path, 3)) == 1
    assert states(lab.search(tmp_path, 3)) == [TrialState.COMPLETE] * 3


def test_a_trial_that_ends_while_lost_ones_are_sought_stays_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = lab.search(tmp_path, 2)
    with study.ask() as asked:
        assert asked is not None
        running = study._trials_in("RUNNING")
        asked.complete(1.0)
    monkeypatch.setattr(study, "_trials_in", lambda *states: running)
    study._requeue_lost()
    assert [trial.state.name for trial in study.study.get_trials()] == ["COMPLETE"]
