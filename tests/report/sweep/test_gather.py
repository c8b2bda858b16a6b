"""A sweep made by hand, gathered: points, curves, shared work, failures; as JSON and CSV.

Importance from a study's journal.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rlhf_exp.cli import main
from rlhf_exp.report.sweep.data import Sweep, group_runs
from rlhf_exp.report.sweep.gather import gather_sweep, importance_of
from rlhf_exp.report.sweep.page import command_of
from rlhf_exp.store.run_records import RunRecord, Status
from tests.report.sweep.lab import Lab, rows_of, swept


def gathered(lab: Lab, name: str = "kl", **more: Any) -> Sweep:
    return gather_sweep(name, lab.records.sweep(name), lab.store, lab.records, **more)


def told(capsys: pytest.CaptureFixture[str], lab: Lab, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["--outputs", str(lab.folder), *arguments]) == 0
    return capsys.readouterr().out


def test_points_settings_and_seeds(tmp_path: Path) -> None:
    found = gathered(swept(tmp_path))
    assert found.varied == ("ppo.lr",)
    by_key = {point.key: point for point in found.points}
    assert by_key["1e4s2"].settings == {"ppo.lr": "0.0001"}
    assert (by_key["1e4s2"].seed, by_key["1e4s2"].objective) == ("2", 6.0)
    assert by_key["1e4s2"].published == 8.0
    assert by_key["bad"].settings == {"ppo.lr": "0.001"}
    assert by_key["bad"].seed == "2"
    assert by_key["bad"].error is not None
    assert by_key["1e4s0"].seconds == 10.0  # without SFT's 100 s, which others share
    assert [(one.stage, one.users, one.seconds) for one in found.works if one.users > 1] == [
        ("sft", 6, 100.0)
    ]
    assert found.disk[0][0] == "kl"


def test_curves_of_runs_that_did_not_come_to_their_end(tmp_path: Path) -> None:
    lab = swept(tmp_path)
    (lab.store.staging("ppo", "bad") / "metrics.jsonl").write_text(rows_of([(0, 1.5, 0.0)]))
    lab.records.write(RunRecord("kl", "ppo", {"sft": "shared", "ppo": "cut"}, status=Status.pruned))
    pruned = lab.records.root / "kl" / "study" / "pruned"
    pruned.mkdir(parents=True)
    (pruned / "cut.jsonl").write_text(rows_of([(0, 2.5, 0.0)]))
    rows = {point.key: point.rows for point in gathered(lab).points}
    assert rows["bad"][0]["eval/reward_mean"] == 1.5
    assert rows["cut"][0]["eval/reward_mean"] == 2.5


def test_a_budget_of_kl_judges_by_the_reward_within_it(tmp_path: Path) -> None:
    # KL of seed s is 0, 1 + s, 4 (1 + s); reward 0, half, whole of the objective.
    objectives = {p.key: p.objective for p in gathered(swept(tmp_path), kl_budget=4.0).points}
    assert objectives == {
        "1e4s0": 1.0,
        "1e4s1": 1.0,
        "1e4s2": 3.0,
        "1e3s0": 4.0,
        "1e3s1": 2.5,
        "bad": None,
    }


def test_a_run_that_was_evaluated_later_counts_once(tmp_path: Path) -> None:
    lab = swept(tmp_path)
    lab.evaluate("later", "1e4s0", [1.0, 2.0])
    keys = {"sft": "shared", "ppo": "1e4s0", "eval": "later"}
    lab.records.write(RunRecord("kl", "eval", keys, ("ppo.lr=1e-4",), objective=0.01))
    objectives = {point.key: point.objective for point in gathered(lab).points}
    assert "1e4s0" not in objectives
    assert objectives["later"] == 1.0  # as when it was trained, in the units of the others


def test_warnings_of_what_cannot_be_compared(tmp_path: Path) -> None:
    lab = swept(tmp_path)
    assert gathered(lab).warnings == []
    lab.point("beta", 1.0, ["ppo.kl.coef=0.5"], keys={"reward": "r2"})
    lab.publish("reward", "r1")
    lab.point("other", 1.0, [], keys={"reward": "r1"})
    words = gathered(lab).warnings
    assert any("2 reward models" in text for text in words)
    assert any("ppo.kl.coef" in text for text in words)
    assert not any("ppo.kl.coef" in text for text in gathered(lab, kl_budget=3.0).warnings)


def test_a_penalty_that_is_no_part_of_the_objective_needs_no_warning(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    for coef in (0.1, 0.2):
        lab.point(f"c{coef}".replace(".", ""), 1.0, [f"ppo.kl.coef={coef}", "ppo.kl.budget=5"])
    found = gathered(lab)
    assert found.varied == ("ppo.kl.coef",)
    assert found.warnings == []
    assert "ppo.kl.budget" in found.objective


def test_the_command_is_that_of_the_settings_without_the_seed(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    for seed in range(2):
        more = [f"ppo.seed={seed}", "hydra/launcher=slurm", "ppo.reward.function=my file.py"]
        lab.point(f"s{seed}", 1.0, more)
    (group,) = group_runs(gathered(lab).points)
    assert command_of(group) == (
        "python launch.py name=kl-best experiment=smoke 'ppo.reward.function=my file.py'"
    )


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told(capsys, swept(tmp_path), "report", "kl", "--json"))
    assert found["best"]["settings"] == {"ppo.lr": "0.001"}
    assert found["best"]["objective"]["mean"] == 4.5
    assert found["best"]["objective"]["low"] is None
    groups = {one["settings"]["ppo.lr"]: one for one in found["groups"]}
    assert groups["0.0001"]["metrics"]["ppo eval/reward_mean"]["values"] == [1.0, 2.0, 6.0]
    runs = {one["key"]: one for one in found["runs"]}
    assert runs["1e4s1"]["evaluations"][1] == {"step": 4.0, "reward": 1.0, "kl": 2.0}
    assert runs["bad"]["error"].endswith("CUDA out of memory")


def test_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = swept(tmp_path)
    rows = list(csv.DictReader(io.StringIO(told(capsys, lab, "report", "kl", "--csv"))))
    assert len(rows) == 6
    by_key = {row["key"]: row for row in rows}
    assert by_key["1e4s2"]["ppo eval/reward_mean"] == "6.0"
    assert (by_key["bad"]["error"], by_key["bad"]["objective"]) == ("CUDA out of memory", "")


def test_any_set_of_runs_makes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = swept(tmp_path)
    lab.point("solo", 7.0, ["ppo.lr=0.5"], name="other")
    page = Path(told(capsys, lab, "report", "kl:ppo.lr=1e-4", "other").strip())
    text = page.read_text()
    assert page.parent == tmp_path / "reports"
    assert "solo" in text
    assert "1e4s2" in text
    assert "1e3s0" not in text
    again = Path(told(capsys, lab, "report", "kl:ppo.lr=1e-3", "other").strip())
    assert again != page
    assert Path(told(capsys, lab, "report", "kl").strip()).name == "sweep-kl.html"


def test_a_choice_that_no_run_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = swept(tmp_path)
    for wanted, said in (
        ("kl:ppo.lr=7", "none has ppo.lr=7; it is 0.0001, 0.001 in them"),
        ("kl:ppo.lrr=7", "none of them has such a key"),
        ("kl:lr", "expected KEY=VALUE"),
    ):
        assert main(["--outputs", str(lab.folder), "report", wanted]) == 2
        assert said in capsys.readouterr().err


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
