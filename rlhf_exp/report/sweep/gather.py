"""Gathering the content of the page of several runs from their records and the store.

The importance of hyperparameters is that of an Optuna study by functional ANOVA: fANOVA (Hutter,
Hoos and Leyton-Brown, 2014) fits a random forest to the trials and splits its variance over the
search space. With few trials it fits noise, so nothing is shown below `FEWEST_TRIALS`.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.errors import UserError
from rlhf_exp.report.chart import STEP, Row
from rlhf_exp.report.run.gather import METRICS
from rlhf_exp.report.sweep.data import (
    Importance,
    RunPoint,
    SettingsSource,
    StageWork,
    Sweep,
    varied_settings,
)
from rlhf_exp.report.sweep.settings import flatten
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.disk_usage import sizes
from rlhf_exp.store.publish import staging_folder
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.store import Store
from rlhf_exp.tracking.local import read_metrics

if TYPE_CHECKING:
    from optuna import Study

log = logging.getLogger(__name__)

REWARD, KL = "eval/reward_mean", "eval/kl_sequence"
TRAINING = ("ppo", "dpo", "reward", "sft")
OBJECTIVES = {
    "ppo": "validation reward in standard deviations of SFT's rewards, less β times the KL",
    "dpo": "DPO's objective on validation pairs",
    "reward": "the reward model's objective on validation pairs",
    "sft": "SFT's objective on validation dialogues",
}
SELECTING = ("ppo.kl.budget", "ppo.kl.select_coef", "ppo.select_by")
_PRUNED = Path("study", "pruned")
FEWEST_TRIALS = 50
_JOURNAL = "study/journal.log"
_STUDY_OBJECTIVES = {
    "reward_at_kl": "the highest validation reward within the study's budget of KL",
    "penalised_reward": "the highest validation reward less the study's penalty of KL",
    "final_reward": "the validation reward at the end",
    "win_rate_at_kl": "the highest validation win rate over SFT within the study's budget of KL",
}
NO_STUDY = "there is no Optuna study: importance is estimated from the trials of a search"
StageArtifacts = Mapping[str, Artifact]


def gather_sweep(
    title: str,
    records: Sequence[RunRecord],
    store: Store,
    all_records: Records,
    logs: Mapping[str, str] | None = None,
    kl_budget: float | None = None,
) -> Sweep:
    """Return the content of the page of some runs.

    Args:
        title: Their common title.
        records: The runs, at least one.
        store: The store with their results.
        all_records: All records, for the results that the runs share with others.
        logs: The file that each run printed to, by final key.
        kl_budget: Nats per answer: the objective is then the highest validation reward within it.
    """
    records = _distinct_runs(records)
    names = sorted({record.name for record in records} & set(all_records.names()))
    importance = importance_of([all_records.root / name for name in names])
    artifacts_of_runs = [_artifacts_of(record, store) for record in records]
    trained = (stage for stage in TRAINING if any(stage in record.keys for record in records))
    stage = next(trained, "eval")
    origins = [
        SettingsSource(record.overrides, _config(record, artifacts))
        for record, artifacts in zip(records, artifacts_of_runs, strict=True)
    ]
    variation = varied_settings(origins)
    damaged: list[str] = []
    users = Counter(pair for record in records for pair in record.keys.items())
    points = [
        replace(
            _point(
                record,
                artifacts,
                stage,
                users,
                _rows(record, artifacts, store, all_records, stage, damaged),
            ),
            settings=variation.settings[number],
            seed=variation.seeds[number],
            log=(logs or {}).get(record.key, ""),
        )
        for number, (record, artifacts) in enumerate(zip(records, artifacts_of_runs, strict=True))
    ]
    if kl_budget is not None:
        points = [
            replace(point, objective=_best_reward_within(point.rows, kl_budget)) for point in points
        ]
    objective = _objective_words(stage, kl_budget, importance.objective, origins)
    return Sweep(
        title=title,
        points=points,
        varied=variation.varied,
        stage=stage,
        objective=objective,
        works=_works(artifacts_of_runs, users),
        importance=importance,
        disk=[(size.name, str(size)) for size in sizes(store, all_records, names)],
        kl_budget=kl_budget,
        warnings=[
            *damaged,
            *_warnings(
                records,
                artifacts_of_runs,
                variation.varied if objective == OBJECTIVES["ppo"] else (),
            ),
        ],
    )


def evaluations(rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """Return (step, validation reward, KL in nats per answer) of each finite evaluation."""
    points = [
        (float(row[STEP]), float(row[REWARD]), float(row[KL]))
        for row in rows
        if REWARD in row and KL in row
    ]
    return [point for point in points if all(map(math.isfinite, point))]


def _objective_words(
    stage: str, kl_budget: float | None, study: str, origins: Sequence[SettingsSource]
) -> str:
    """Return the objective in words."""
    if kl_budget is not None and stage == "ppo":
        return f"the highest validation reward at a KL of at most {kl_budget:g} nats per answer"
    if study:
        return study
    chosen = {
        name
        for origin in origins
        for name in SELECTING
        if origin.config is not None and origin.config.get(name) not in (None, "reward")
    }
    if stage == "ppo" and chosen:
        return f"what the weights were selected by, with {' and '.join(sorted(chosen))}"
    return OBJECTIVES.get(stage, "the objective")


def _distinct_runs(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return each run once: its last record, and none of a run that another one continued.

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


def _artifacts_of(record: RunRecord, store: Store) -> dict[str, Artifact]:
    artifacts = {stage: store.lookup(stage, key) for stage, key in record.keys.items()}
    return {stage: artifact for stage, artifact in artifacts.items() if artifact is not None}


def _config(record: RunRecord, artifacts: StageArtifacts) -> dict[str, object] | None:
    """Return a run's flat config, from its last stage: earlier ones may be another run's."""
    last = next(reversed(record.keys))
    return flatten(artifacts[last].manifest.config) if last in artifacts else None


def _metrics(artifacts: StageArtifacts) -> dict[str, float]:
    return {
        f"{stage} {name}": value
        for stage, artifact in artifacts.items()
        for name, value in artifact.manifest.metrics.items()
    }


def _rows(
    record: RunRecord,
    artifacts: StageArtifacts,
    store: Store,
    all_records: Records,
    stage: str,
    damaged: list[str],
) -> Sequence[Row]:
    """Return the metrics that a stage logged, also in a run that did not finish.

    Of a damaged file the reason goes to `damaged`; the page does without it.
    """
    if stage not in record.keys:
        return ()
    try:
        return logged_metrics(record, stage, artifacts.get(stage), store, all_records)
    except UserError as error:
        log.warning("left out of the report: %s", error)
        damaged.append(f"Left out: {error}.")
        return ()


def logged_metrics(
    record: RunRecord, stage: str, artifact: Artifact | None, store: Store, all_records: Records
) -> Sequence[Row]:
    """Return what a stage of a run logged, also of work that is under way or was stopped.

    Args:
        record: The run.
        stage: One of its stages.
        artifact: The stage's result, if there is one.
        store: The store of the results.
        all_records: All records, whose folder keeps what pruned trials logged.

    Raises:
        UserError: The file is damaged.
    """
    key = record.keys[stage]
    published = None if artifact is None else artifact.file(METRICS)
    places = [
        staging_folder(store.root, stage, key) / METRICS,
        all_records.root / record.name / _PRUNED / f"{key}.jsonl",
    ]
    places = places if published is None else [published]
    return next((read_metrics(path) for path in places if path.is_file()), ())


def _point(
    record: RunRecord,
    artifacts: StageArtifacts,
    stage: str,
    users: Counter[tuple[str, str]],
    rows: Sequence[Row],
) -> RunPoint:
    """Return a run without the fields that need the other runs: settings, seed, log."""
    stage_metrics = artifacts[stage].manifest.metrics if stage in artifacts else {}
    return RunPoint(
        name=record.name,
        key=record.key,
        status=str(record.status),
        overrides=record.overrides,
        settings={},
        seed="",
        objective=record.objective,
        metrics=_metrics(artifacts),
        rows=rows,
        published=stage_metrics.get("published_step"),
        keys=record.keys,
        seconds=_seconds(artifacts, users),
        error=record.error,
    )


def _best_reward_within(rows: Sequence[Row], kl_budget: float) -> float | None:
    """Return the highest reward of an evaluation whose KL is within the budget."""
    return max((reward for _, reward, kl in evaluations(rows) if kl <= kl_budget), default=None)


def _seconds(artifacts: StageArtifacts, users: Counter[tuple[str, str]]) -> float | None:
    own = [
        artifact.manifest.duration_s
        for stage, artifact in artifacts.items()
        if users[stage, artifact.key] == 1
    ]
    return sum(own) if own else None


def _works(
    artifacts_of_runs: Sequence[StageArtifacts], users: Counter[tuple[str, str]]
) -> list[StageWork]:
    distinct = {
        (stage, artifact.key): artifact
        for artifacts in artifacts_of_runs
        for stage, artifact in artifacts.items()
    }
    return [
        StageWork(stage, key, artifact.manifest.duration_s, users[stage, key])
        for (stage, key), artifact in distinct.items()
    ]


def _warnings(
    records: Sequence[RunRecord],
    artifacts_of_runs: Sequence[StageArtifacts],
    varied: Sequence[str],
) -> list[str]:
    """Return reservations for the reader; `varied` is empty if it is no part of the objective."""
    notes = []
    judges = {record.keys["reward"] for record in records if "reward" in record.keys}
    if len(judges) > 1 and any("ppo" in record.keys for record in records):
        notes.append(
            f"{len(judges)} reward models judge these runs: rewards of different reward models "
            "cannot be compared, nor the objectives made of them."
        )
    beta = [key for key in varied if key.startswith("ppo.kl.") or key == "ppo.reward.scale"]
    if beta:
        notes.append(
            f"{', '.join(beta)} varies and is a part of the objective, so that the "
            "objectives of runs with different values cannot be compared as they are. Judge by the "
            "reward at equal KL (the chart below, or --kl-budget NATS)."
        )
    dirty = sum(
        any(artifact.manifest.git.get("dirty") for artifact in artifacts.values())
        for artifacts in artifacts_of_runs
    )
    if dirty:
        notes.append(f"{dirty} of {len(records)} runs were made with uncommitted changes.")
    return notes


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
        return Importance(0, reason="Optuna is not installed (pip install optuna)")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _importance_of_study(_load_study(journals[0], Path(folder)))


def _load_study(journal: Path, folder: Path) -> Study | None:
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


def _importance_of_study(study: Study | None) -> Importance:
    import optuna

    if study is None:
        return Importance(0, reason="the study has no trials yet")
    objective = _STUDY_OBJECTIVES.get(study.user_attrs.get("about", {}).get("objective", ""), "")
    complete = optuna.trial.TrialState.COMPLETE
    count = len(study.get_trials(deepcopy=False, states=(complete,)))
    if count < FEWEST_TRIALS:
        return Importance(
            count,
            reason=f"the study has {count} complete trials, and from fewer than {FEWEST_TRIALS} "
            "the estimate says more about chance than about hyperparameters",
            objective=objective,
        )
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except ImportError:
        reason = "fANOVA needs scikit-learn (pip install scikit-learn)"
        return Importance(count, reason=reason, objective=objective)
    except (ValueError, RuntimeError) as error:
        reason = f"fANOVA found nothing to explain ({error})"
        return Importance(count, reason=reason, objective=objective)
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return Importance(
        count, tuple((name, float(share)) for name, share in ordered), objective=objective
    )
