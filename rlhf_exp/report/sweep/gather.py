"""Collecting what the page of several runs shows from their records and the store.

How much each hyperparameter of an Optuna study matters, by functional ANOVA.

fANOVA (Hutter, Hoos and Leyton-Brown, 2014) fits a random forest to the trials and splits its
variance over the search space. With few trials it fits noise, so there is nothing below `FEWEST`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.report.chart import STEP, Row
from rlhf_exp.report.run.gather import METRICS
from rlhf_exp.report.sweep.data import (
    Importance,
    Origin,
    RunPoint,
    StageWork,
    Sweep,
    flatten,
    settle,
)
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.disk_usage import sizes
from rlhf_exp.store.publish import staging_folder
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.store import Store
from rlhf_exp.tracking.local import read_metrics

if TYPE_CHECKING:
    from optuna import Study

REWARD, KL = "eval/reward_mean", "eval/kl_sequence"
TRAINING = ("ppo", "reward", "sft")
OBJECTIVES = {
    "ppo": "validation reward in standard deviations of SFT's rewards, less β times the KL",
    "reward": "the reward model's objective on validation pairs",
    "sft": "SFT's objective on validation dialogues",
}
SELECTING = ("ppo.kl.budget", "ppo.kl.select_coef", "ppo.select_by")
_PRUNED = Path("study", "pruned")

Made = Mapping[str, Artifact]


def gather_sweep(
    title: str,
    records: Sequence[RunRecord],
    store: Store,
    every: Records,
    logs: Mapping[str, str] | None = None,
    kl_budget: float | None = None,
) -> Sweep:
    """Return what is known of some runs.

    Args:
        title: What they are called together.
        records: The runs, at least one.
        store: With their results.
        every: All records, for what the runs share with others.
        logs: The file that each run printed to, by final key.
        kl_budget: Nats per answer: the objective is then the highest validation reward within it.
    """
    records = _distinct(records)
    names = sorted({record.name for record in records} & set(every.names()))
    importance = importance_of([every.root / name for name in names])
    made = [_made(record, store) for record in records]
    stage = next((one for one in TRAINING if any(one in record.keys for record in records)), "eval")
    origins = [
        Origin(record.overrides, _config(record, found))
        for record, found in zip(records, made, strict=True)
    ]
    settled = settle(origins)
    users = Counter(pair for record in records for pair in record.keys.items())
    points = [
        replace(
            _point(record, found, stage, users, _rows(record, found, store, every, stage)),
            settings=settled.settings[number],
            seed=settled.seeds[number],
            log=(logs or {}).get(record.key, ""),
        )
        for number, (record, found) in enumerate(zip(records, made, strict=True))
    ]
    if kl_budget is not None:
        points = [replace(one, objective=_within(one.rows, kl_budget)) for one in points]
    aim = _aim(stage, kl_budget, importance.objective, origins)
    return Sweep(
        title=title,
        points=points,
        varied=settled.varied,
        stage=stage,
        objective=aim,
        works=_works(made, users),
        importance=importance,
        disk=[(one.name, str(one)) for one in sizes(store, every, names)],
        kl_budget=kl_budget,
        warnings=_warnings(records, made, settled.varied if aim == OBJECTIVES["ppo"] else ()),
    )


def evaluations(rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """Return (step, validation reward, KL in nats per answer) of each finite evaluation."""
    found = [
        (float(row[STEP]), float(row[REWARD]), float(row[KL]))
        for row in rows
        if REWARD in row and KL in row
    ]
    return [one for one in found if all(map(math.isfinite, one))]


def _aim(stage: str, kl_budget: float | None, study: str, origins: Sequence[Origin]) -> str:
    """Return what the objective is, in words."""
    if kl_budget is not None and stage == "ppo":
        return f"the highest validation reward at a KL of at most {kl_budget:g} nats per answer"
    if study:
        return study
    chosen = {
        name
        for one in origins
        for name in SELECTING
        if one.config is not None and one.config.get(name) not in (None, "reward")
    }
    if stage == "ppo" and chosen:
        return f"what the weights were selected by, with {' and '.join(sorted(chosen))}"
    return OBJECTIVES.get(stage, "the objective")


def _distinct(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return each run once: without records of a key again, or of a run that went further.

    A trial of a study that was evaluated later keeps the study's objective.
    """
    last = {record.key: record for record in records}
    inner: set[str] = set()
    for record in list(last.values()):
        earlier = [key for key in record.keys.values() if key in last and key != record.key]
        if record.status is Status.done and earlier:
            inner.update(earlier)
            objective = last[earlier[-1]].objective
            if objective is not None:
                last[record.key] = replace(record, objective=objective)
    return [record for key, record in last.items() if key not in inner]


def _made(record: RunRecord, store: Store) -> dict[str, Artifact]:
    found = {stage: store.lookup(stage, key) for stage, key in record.keys.items()}
    return {stage: one for stage, one in found.items() if one is not None}


def _config(record: RunRecord, found: Made) -> dict[str, object] | None:
    """Return a run's flat config; what it shares with others may have been made by another."""
    last = next(reversed(record.keys))
    return flatten(found[last].manifest.config) if last in found else None


def _metrics(found: Made) -> dict[str, float]:
    return {
        f"{stage} {name}": value
        for stage, one in found.items()
        for name, value in one.manifest.metrics.items()
    }


def _rows(
    record: RunRecord, found: Made, store: Store, every: Records, stage: str
) -> Sequence[Row]:
    """Return what a stage has logged, also in a run that did not come to its end."""
    if stage not in record.keys:
        return ()
    key = record.keys[stage]
    places = [
        staging_folder(store.root, stage, key) / METRICS,
        every.root / record.name / _PRUNED / f"{key}.jsonl",
    ]
    if stage in found:
        places.insert(0, found[stage].path / METRICS)
    return next((read_metrics(path) for path in places if path.is_file()), ())


def _point(
    record: RunRecord,
    found: Made,
    stage: str,
    users: Counter[tuple[str, str]],
    rows: Sequence[Row],
) -> RunPoint:
    """Return a run without what only the comparison with others tells."""
    made = found[stage].manifest.metrics if stage in found else {}
    return RunPoint(
        name=record.name,
        key=record.key,
        status=str(record.status),
        overrides=record.overrides,
        settings={},
        seed="",
        objective=record.objective,
        metrics=_metrics(found),
        rows=rows,
        published=made.get("published_step"),
        keys=record.keys,
        seconds=_seconds(found, users),
        error=record.error,
    )


def _within(rows: Sequence[Row], kl_budget: float) -> float | None:
    """Return the highest reward of an evaluation whose KL is within the budget."""
    return max((reward for _, reward, kl in evaluations(rows) if kl <= kl_budget), default=None)


def _seconds(found: Made, users: Counter[tuple[str, str]]) -> float | None:
    own = [one.manifest.duration_s for stage, one in found.items() if users[stage, one.key] == 1]
    return sum(own) if own else None


def _works(made: Sequence[Made], users: Counter[tuple[str, str]]) -> list[StageWork]:
    each = {(stage, one.key): one for found in made for stage, one in found.items()}
    return [
        StageWork(stage, key, one.manifest.duration_s, users[stage, key])
        for (stage, key), one in each.items()
    ]


def _warnings(
    records: Sequence[RunRecord],
    made: Sequence[Made],
    varied: Sequence[str],
) -> list[str]:
    """Return what the reader must know; `varied` is empty where it is no part of the objective."""
    found = []
    judges = {record.keys["reward"] for record in records if "reward" in record.keys}
    if len(judges) > 1 and any("ppo" in record.keys for record in records):
        found.append(
            f"{len(judges)} reward models judge these runs: rewards of different reward models "
            "cannot be compared, nor the objectives made of them."
        )
    beta = [key for key in varied if key.startswith("ppo.kl.") or key == "ppo.reward.scale"]
    if beta:
        found.append(
            f"{', '.join(beta)} varies and is a part of the objective, so that the "
            "objectives of runs with different values cannot be compared as they are. Judge by the "
            "reward at equal KL (the chart below, or --kl-budget NATS)."
        )
    dirty = sum(
        any(one.manifest.git.get("dirty") for one in found_of.values()) for found_of in made
    )
    if dirty:
        found.append(f"{dirty} of {len(records)} runs were made with uncommitted changes.")
    return found


FEWEST = 50
_JOURNAL = "study/journal.log"
_AIMS = {
    "reward_at_kl": "the highest validation reward within the study's budget of KL",
    "penalised_reward": "the highest validation reward less the study's penalty of KL",
    "final_reward": "the validation reward at the end",
    "win_rate_at_kl": "the highest validation win rate over SFT within the study's budget of KL",
}
NO_STUDY = "there is no Optuna study: importance is estimated from the trials of a search"


def importance_of(folders: Sequence[Path]) -> Importance:
    """Return the importance of the hyperparameters of the study in the runs' folder.

    Args:
        folders: Those of the runs' names; with more than one there is no single study.
    """
    journals = [path for folder in folders if (path := folder / _JOURNAL).exists()]
    if not journals:
        return Importance(0, reason=NO_STUDY)
    if len(folders) > 1:
        return Importance(0, reason="these are the runs of several names, not of one study")
    try:
        import optuna
    except ImportError:
        return Importance(0, reason="Optuna is not installed (pip install 'rlhf-exp[sweeps]')")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _of_study(_loaded(journals[0], Path(folder)))


def _loaded(journal: Path, folder: Path) -> Study | None:
    """Load a study from a copy without the line that a worker is writing now."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    copy = folder / journal.name
    shutil.copyfile(journal, copy)
    content = copy.read_bytes()
    copy.write_bytes(content[: content.rfind(b"\n") + 1])
    storage = JournalStorage(JournalFileBackend(str(copy)))
    names = [study.study_name for study in storage.get_all_studies()]
    return optuna.load_study(study_name=names[0], storage=storage) if names else None


def _of_study(study: Study | None) -> Importance:
    import optuna

    if study is None:
        return Importance(0, reason="the study has no trials yet")
    aim = _AIMS.get(study.user_attrs.get("about", {}).get("objective", ""), "")
    complete = optuna.trial.TrialState.COMPLETE
    count = len(study.get_trials(deepcopy=False, states=(complete,)))
    if count < FEWEST:
        return Importance(
            count,
            reason=f"the study has {count} complete trials, and from fewer than {FEWEST} the "
            "estimate says more about chance than about hyperparameters",
            objective=aim,
        )
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except ImportError:
        reason = "fANOVA needs scikit-learn (pip install 'rlhf-exp[sweeps]')"
        return Importance(count, reason=reason, objective=aim)
    except (ValueError, RuntimeError) as error:
        reason = f"fANOVA found nothing to explain ({error})"
        return Importance(count, reason=reason, objective=aim)
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return Importance(count, tuple((name, float(share)) for name, share in ordered), objective=aim)
