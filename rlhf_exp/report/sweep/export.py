"""Several runs as JSON and as CSV: the page's tables and points, for other programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

from rlhf_exp.report.sweep.data import Point, Sweep
from rlhf_exp.report.sweep.gather import evaluations
from rlhf_exp.report.sweep.groups import Group, best_of, grouped
from rlhf_exp.report.sweep.launching import command_of


def to_json(sweep: Sweep) -> dict[str, Any]:
    """Return everything but the curves as values that JSON has; what is not finite is null."""
    groups = grouped(sweep.points)
    importance = sweep.importance
    return {
        "title": sweep.title,
        "stage": sweep.stage,
        "objective": sweep.objective,
        "kl_budget": sweep.kl_budget,
        "varied": list(sweep.varied),
        "runs": [_run(point) for point in sweep.points],
        "groups": [_group(group) for group in groups],
        "best": _best(groups),
        "importance": {
            "trials": importance.trials,
            "shares": dict(importance.shares),
            "reason": importance.reason or None,
        },
        "works": [
            {"stage": one.stage, "key": one.key, "seconds": one.seconds, "users": one.users}
            for one in sweep.works
        ],
        "disk": dict(sweep.disk),
        "warnings": list(sweep.warnings),
    }


def to_csv(sweep: Sweep) -> str:
    """Return one line a run: what it is, its settings, its final metrics, its error's last line."""
    names = sorted({name for point in sweep.points for name in point.metrics})
    fixed = ["name", "key", "status", "seed"]
    columns = [*fixed, *sweep.varied, "objective", "seconds", *names, "error", "log"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for point in sweep.points:
        cells: Mapping[str, Any] = {
            "name": point.name,
            "key": point.key,
            "status": point.status,
            "seed": point.seed,
            **point.settings,
            "objective": _plain(point.objective),
            "seconds": point.seconds,
            **{name: _plain(value) for name, value in point.metrics.items()},
            "error": last_line(point.error),
            "log": point.log,
        }
        writer.writerow("" if cells.get(name) is None else cells[name] for name in columns)
    return buffer.getvalue()


def last_line(error: str | None) -> str:
    """Return the last line of an error that says something."""
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else ""


def _run(point: Point) -> dict[str, Any]:
    found = evaluations(point.rows)
    return {
        "name": point.name,
        "key": point.key,
        "keys": dict(point.keys),
        "status": point.status,
        "overrides": list(point.overrides),
        "settings": dict(point.settings),
        "seed": point.seed or None,
        "objective": _plain(point.objective),
        "metrics": {name: _plain(value) for name, value in point.metrics.items()},
        "evaluations": [{"step": step, "reward": reward, "kl": kl} for step, reward, kl in found],
        "seconds": point.seconds,
        "error": point.error,
        "log": point.log or None,
    }


def _group(group: Group) -> dict[str, Any]:
    names = sorted({name for point in group.done for name in point.metrics})
    objective = group.objective()
    found = {name: group.metric(name) for name in names}
    return {
        "settings": dict(group.settings),
        "seeds": [point.seed for point in group.done],
        "objective": None if objective is None else objective.to_json(),
        "metrics": {name: one.to_json() for name, one in found.items() if one is not None},
    }


def _best(groups: list[Group]) -> dict[str, Any] | None:
    ranked = best_of(groups)
    if not ranked:
        return None
    group, found = ranked[0]
    return {
        "settings": dict(group.settings),
        "objective": found.to_json(),
        "command": command_of(group),
    }


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
