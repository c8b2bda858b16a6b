"""A worker of a study: trials through the store, their endings, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.cli import main
from rlhf_exp.errors import JobsFailed, UserError
from rlhf_exp.launchers.optuna.trial import study_folder
from rlhf_exp.search.study import open_study, summary_of
from rlhf_exp.store.run_records import Status
from rlhf_exp.store.store import Store
from tests.launchers.optuna.lab import (
    NAME,
    Stand,
    records,
    reward,
    run_study,
    stand,
    states,
    trials_of,
)

__all__ = ["stand"]


def test_a_study_tries_keeps_and_goes_on(run_copy: Path, stand: Stand) -> None:
    best = run_study(run_copy, 3)
    # The first has the config's own learning rate, 1e-3, which is the best.
    assert stand.ran[0] == 1e-3
    assert best == pytest.approx(1.0)
    assert run_study(run_copy, 3) == pytest.approx(1.0)
    assert len(stand.ran) == 3
    run_study(run_copy, 5)
    assert (len(stand.ran), states(run_copy)) == (5, ["COMPLETE"] * 5)
    for trial, lr in zip(trials_of(run_copy), stand.ran, strict=True):
        record = records(run_copy)[trial.user_attrs["key"]]
        assert record.status is Status.done
        assert record.objective == trial.value == pytest.approx(reward(lr, 1.0))
        assert f"ppo.lr={lr}" in record.overrides
        assert Store(run_copy / "store").lookup("ppo", record.key) is not None
        assert trial.params["ppo.lr"] == pytest.approx(lr, rel=1e-3)
        shares = {place: reward(lr, place / 3) for place in range(4)}
        best_so_far = {place: max(shares[p] for p in range(place + 1)) for place in shares}
        assert trial.intermediate_values == pytest.approx(best_so_far)


def test_what_is_in_the_store_is_not_trained_again(run_copy: Path, stand: Stand) -> None:
    run_study(run_copy, 2)
    (study_folder(run_copy, NAME) / "journal.log").unlink()
    assert run_study(run_copy, 2) == pytest.approx(1.0)
    assert len(stand.ran) == 2
    assert states(run_copy) == ["COMPLETE"] * 2
    assert trials_of(run_copy)[0].intermediate_values[3] == pytest.approx(1.0)
    assert [trial.user_attrs["iterations_run"] for trial in trials_of(run_copy)] == [0, 0]


def test_a_pruned_trial_is_recorded_and_not_published(
    run_copy: Path, stand: Stand, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("study.pruner=median", "study.prune_after=1", "study.warmup=0")
    run_study(run_copy, 6, *settings)
    # Against the median of the complete trials: whatever is worse than the first is pruned at the
    # first evaluation after the one before training: step 2 of 6, 1 of 3 iterations.
    assert states(run_copy) == ["COMPLETE"] + ["PRUNED"] * 5
    store = Store(run_copy / "store")
    for trial, lr in list(zip(trials_of(run_copy), stand.ran, strict=True))[1:]:
        record = records(run_copy)[trial.user_attrs["key"]]
        assert (record.status, record.objective) == (Status.pruned, pytest.approx(trial.value))
        assert trial.value == pytest.approx(max(0.0, reward(lr, 1 / 3)))
        assert store.lookup("ppo", record.key) is None
        assert store.unfinished("ppo", record.key) is None
        kept = study_folder(run_copy, NAME) / "pruned" / f"{record.key}.jsonl"
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        assert [row["global_step"] for row in rows] == [0, 2]
    summary = summary_of(open_study(study_folder(run_copy, NAME)))
    # A trial has 3 iterations of 2 steps; each of the five ran one.
    assert (summary.saved, summary.planned) == (10, 18)
    assert main(["--outputs", str(run_copy), "status", NAME]) == 0
    text = capsys.readouterr().out
    assert "study tpe: 6 of 6 trials: 1 done, 5 pruned" in text
    assert "pruning saved 10 of 18 iterations (56%)" in text
    assert "python launch.py name=tpe-best" in text


def test_failed_trials_and_numbers_that_are_none_do_not_end_a_study(
    run_copy: Path, stand: Stand
) -> None:
    failed: list[float] = []

    def fate(lr: float, step: int) -> None:
        if len(stand.ran) == 1:
            failed.append(lr)
            raise RuntimeError("no luck")
        if len(stand.ran) == 2:
            stand.broken.append(lr)

    stand.fate = fate
    run_study(run_copy, 4)
    assert states(run_copy) == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    first, second = trials_of(run_copy)[:2]
    assert first.user_attrs["error"].strip().endswith("RuntimeError: no luck")
    assert second.user_attrs["error"] == "the objective is nan"
    record = records(run_copy)[first.user_attrs["key"]]
    assert record.status is Status.failed
    assert "no luck" in (record.error or "")
    # They count: the same command has nothing left to do.
    assert run_study(run_copy, 4) is not None
    assert len(stand.ran) == 4


def test_a_worker_gives_up_where_nothing_but_failures_comes(run_copy: Path, stand: Stand) -> None:
    def fate(lr: float, step: int) -> None:
        raise RuntimeError("no disk")

    stand.fate = fate
    with pytest.raises(JobsFailed, match=r"the last 2 trials .* have failed(?s:.*)no disk"):
        run_study(run_copy, 9, "study.max_failures=2")
    assert states(run_copy) == ["FAIL"] * 2


def test_an_interrupted_trial_goes_on_from_where_it_was(run_copy: Path, stand: Stand) -> None:
    def fate(lr: float, step: int) -> None:
        if len(stand.ran) == 2 and step == 4:
            raise KeyboardInterrupt

    stand.fate = fate
    with pytest.raises(KeyboardInterrupt):
        run_study(run_copy, 3)
    assert states(run_copy) == ["COMPLETE", "FAIL", "WAITING"]
    interrupted = trials_of(run_copy)[1]
    assert records(run_copy)[interrupted.user_attrs["key"]].status is Status.interrupted
    run_study(run_copy, 3)
    assert stand.ran[1] == stand.ran[2]
    assert stand.from_steps[:3] == [0, 0, 4]
    assert states(run_copy) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    again = trials_of(run_copy)[2]
    # What was evaluated before the interruption counts too.
    assert sorted(again.intermediate_values) == [0, 1, 2, 3]


def test_another_study_under_the_same_name_is_refused(run_copy: Path, stand: Stand) -> None:
    run_study(run_copy, 1)
    with pytest.raises(UserError) as caught:
        run_study(run_copy, 2, "ppo.epochs=2", "study.kl_budget=3")
    assert "ppo.epochs: 1 in the study, 2 now" in str(caught.value)
    assert "ppo.kl.budget: 10.0 in the study, 3.0 now" in str(caught.value)
    with pytest.raises(UserError, match="reward model: "):
        run_study(run_copy, 2, "reward.steps=3")
    assert states(run_copy) == ["COMPLETE"]
    # A wider range is the same study.
    wider = "study.space=[{key:ppo.lr,low:1e-7,high:1,log:true}]"
    run_study(run_copy, 2, wider)
    assert states(run_copy) == ["COMPLETE"] * 2


def test_what_all_trials_share_costs_no_trial(
    run_copy: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no data")

    monkeypatch.setattr("rlhf_exp.stages.reward.run", fails)
    with pytest.raises(RuntimeError, match="no data"):
        run_study(run_copy, 2, "reward.steps=4")
    assert not (study_folder(run_copy, NAME) / "journal.log").exists()


def test_without_optuna_it_says_what_to_install(
    run_copy: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match="`pip install optuna`"):
        run_study(run_copy, 1)
