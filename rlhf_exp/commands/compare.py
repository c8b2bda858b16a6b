"""`rlhf-exp compare A B`: how two runs differ in config and in results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.commands.text import table
from rlhf_exp.evaluation.result import QuickResult
from rlhf_exp.evaluation.statistics import paired_difference
from rlhf_exp.store.artifact import Artifact

RESULT = "result.json"
# Where a run was stored and how it was watched does not make it another experiment.
_ASIDE = ("name", "output_dir", "plan", "probe", "cache", "rerun", "stage", "tracking")
_PAIRED = (("Reward, raw", "score_b"), ("Gold judge", "gold_b"), ("Toxicity", "toxicity_b"))


def compare(outputs: Path, first: str, second: str) -> str:
    """Return the differences between two runs as text."""
    found = Outputs(outputs)
    sides = [found.artifacts(run) for run in (first, second)]
    names = (f"A: {first}", f"B: {second}")
    parts = [_configs(sides, names), _metrics(sides, names), _answers(sides)]
    return "\n".join(part for part in parts if part)


def _configs(sides: list[dict[str, Artifact]], names: tuple[str, str]) -> str:
    flat = [_flatten(list(side.values())[-1].manifest.config) for side in sides]
    keys = [
        key
        for key in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(key) != flat[1].get(key) and key.split(".")[0] not in _ASIDE
    ]
    if not keys:
        return "The configs are the same.\n"
    rows = [(key, *(_shown(side.get(key, "")) for side in flat)) for key in keys]
    return table(("config", *names), rows)


def _metrics(sides: list[dict[str, Artifact]], names: tuple[str, str]) -> str:
    rows = []
    for stage in ("sft", "reward", "ppo", "eval"):
        if not all(stage in side for side in sides):
            continue
        ours, theirs = (side[stage].manifest.metrics for side in sides)
        for name in sorted(ours.keys() & theirs.keys()):
            difference = theirs[name] - ours[name]
            rows.append(
                (
                    f"{stage} {name}",
                    f"{ours[name]:.4g}",
                    f"{theirs[name]:.4g}",
                    f"{difference:+.4g}",
                )
            )
    return table(("result", *names, "B - A"), rows) if rows else ""


def _answers(sides: list[dict[str, Artifact]]) -> str:
    """Compare the final policies prompt by prompt, where both were asked the same."""
    if not all("eval" in side for side in sides):
        return ""
    results = [
        QuickResult.from_json(json.loads((side["eval"].path / RESULT).read_text()))
        for side in sides
    ]
    if [row.prompt for row in results[0].rows] != [row.prompt for row in results[1].rows]:
        return "The two were evaluated on different prompts: no paired comparison.\n"
    same_judge = sides[0]["eval"].manifest.parents.get("reward") == sides[1][
        "eval"
    ].manifest.parents.get("reward")
    rows = []
    for label, name in _PAIRED:
        if name == "score_b" and not same_judge:
            continue
        values = [[getattr(row, name) for row in result.rows] for result in results]
        if any(value is None for column in values for value in column):
            continue
        found = paired_difference(np.array(values[0]), np.array(values[1]), seed=0)
        rows.append((label, f"{found.mean:+.4g}", f"{found.low:+.4g} to {found.high:+.4g}"))
    note = "" if same_judge else "The reward models differ, so raw rewards are not compared.\n"
    count = len(results[0].rows)
    title = f"B - A over the same {count} prompts"
    return table((title, "mean", "95 % interval"), rows) + note


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
