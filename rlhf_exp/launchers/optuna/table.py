"""A study as a text table: its trials, iterations saved by pruning, results on test prompts."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.launchers.optuna.trial import study_folder
from rlhf_exp.program import PROGRAM
from rlhf_exp.search.study import TRIALS, StudySummary, TrialView, open_study, summary_of
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.run_records import Records, RunRecord
from rlhf_exp.store.store import Store

_WIDTH = 140
_ORDER = ("done", "running", "waiting", "pruned", "failed")
_VALIDATION = ("eval/reward_mean", "eval/win_rate", "eval/kl_sequence")
_TESTS = {
    "test gain (std)": "eval/reward/gain_in_std",
    "test wins": "eval/outcome/ties_as_half",
    "test KL": "eval/kl_sequence/b",
}


def study_text(outputs: Path, name: str) -> str:
    """Return a study as text, with the command that runs its best trial alone.

    Args:
        outputs: The output folder.
        name: The study's name.
    """
    study = open_study(study_folder(outputs, name))
    summary, planned = summary_of(study), study.user_attrs.get(TRIALS)
    store, records = Store(outputs / "store"), Records(outputs / "sweeps").sweep(name)
    parts = [_headline(name, summary, planned)]
    if summary.trials:
        parts.append(_trials(summary, store, _test_evaluations(records, store)))
    if summary.best:
        best = summary.best[0]
        overrides = next((record.overrides for record in records if record.key == best.key), ())
        parts.append(
            f"Best: trial {best.number}. Its policy is {best.key} in the store; by itself:\n"
            f"  {PROGRAM} {shlex.join([f'name={name}-best', *overrides])}\n"
        )
    return "\n".join(parts)


def _headline(name: str, summary: StudySummary, planned: int | None) -> str:
    counts = [f"{n} {state}" for state in _ORDER if (n := summary.count(state))]
    of = "" if planned is None else f" of {planned}"
    text = f"study {name}: {len(summary.trials)}{of} trials: {', '.join(counts) or 'none yet'}"
    if summary.requeued:
        text += f" ({summary.requeued} begun again)"
    text += "\n"
    if summary.count("pruned"):
        share = summary.saved / summary.planned
        text += f"pruning saved {summary.saved} of {summary.planned} iterations ({share:.0%})\n"
    return text


def _test_evaluations(records: Sequence[RunRecord], store: Store) -> dict[str, Artifact]:
    """Return the evaluations on test prompts, by the key of the policy."""
    evaluations = {}
    for record in records:
        if "eval" in record.keys and "ppo" in record.keys:
            artifact = store.lookup("eval", record.keys["eval"])
            if artifact is not None:
                evaluations[record.keys["ppo"]] = artifact
    return evaluations


def _trials(summary: StudySummary, store: Store, tested: dict[str, Artifact]) -> str:
    best = [trial.number for trial in summary.best]
    trials = sorted(
        summary.trials,
        key=lambda trial: (
            _ORDER.index(trial.state),
            best.index(trial.number) if trial.number in best else trial.number,
        ),
    )
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    tests = list(_TESTS) if tested else []
    header = ("trial", "state", "objective", "reward", "wins", "KL", "iterations", *tests)
    rows = []
    for trial in trials:
        artifact = store.lookup("ppo", trial.key) if trial.state == "done" else None
        measured = [_number(artifact, metric) for metric in _VALIDATION]
        on_test = [_number(tested.get(trial.key), _TESTS[name]) for name in tests]
        values = [f"{trial.values[key]:g}" if key in trial.values else "" for key in keys]
        objective = "" if trial.objective is None else f"{trial.objective:.4g}"
        cells = (str(trial.number), trial.state, objective, *measured, _iterations(trial))
        rows.append((*cells, *on_test, *values, trial.error.strip().rpartition("\n")[2]))
    return _table((*header, *(key.removeprefix("ppo.") for key in keys), ""), rows)


def _iterations(trial: TrialView) -> str:
    if trial.state == "pruned":
        return f"{trial.iterations_run} of {trial.iterations}"
    return str(trial.iterations) if trial.iterations else ""


def _number(artifact: Artifact | None, metric: str) -> str:
    value = None if artifact is None else artifact.manifest.metrics.get(metric)
    return "" if value is None else f"{value:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
