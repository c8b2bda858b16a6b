"""A store with a sweep in it, made by hand: no model, only what reports read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.evaluation.comparison import compare_models
from rlhf_exp.store.artifact import Artifact, Manifest
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.store import Store

BASE = ("experiment=smoke", "name=kl")


class Lab:
    """An output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store, self.records = Store(folder / "store"), Records(folder / "sweeps")

    def publish(
        self, stage: str, key: str, files: Mapping[str, Any] | None = None, **fields: Any
    ) -> Artifact:
        """Put a result into the store."""
        folder = self.store.staging(stage, key)
        for name, content in ({"facts.json": {}} | dict(files or {})).items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
        return self.store.publish(stage, key, folder, Manifest(stage, key, **fields))

    def point(
        self,
        key: str,
        objective: float,
        overrides: Sequence[str],
        curve: Sequence[tuple[int, float, float]] = (),
        name: str = "kl",
        **more: Any,
    ) -> None:
        """Put a run of PPO into the store, with the config that its command line says."""
        config: dict[str, Any] = {"name": name, "ppo": {"lr": 1e-4, "kl": {"coef": 0.05}}}
        config["ppo"]["seed"] = 0
        for text in overrides:
            path, _, value = text.partition("=")
            part = config
            *inner, last = path.split(".")
            for step in inner:
                part = part.setdefault(step, {})
            part[last] = json.loads(value) if value[0] in "0123456789." else value
        _, reward, kl = curve[-1] if curve else (0, objective, 1.0)
        metrics = {"eval/reward_mean": reward, "eval/kl_sequence": kl, "eval/objective": objective}
        metrics |= {"published_step": float(curve[-1][0])} if curve else {}
        self.publish(
            "ppo",
            key,
            {"metrics.jsonl": rows_of(curve)},
            config=config,
            metrics=metrics | more.pop("metrics", {}),
            parents={"sft": "shared"},
            duration_s=10.0,
        )
        keys = {"sft": "shared", "ppo": key} | more.pop("keys", {})
        record = RunRecord(name, "ppo", keys, (*BASE, *overrides), 0, objective=objective, **more)
        self.records.write(record)

    def evaluate(self, key: str, ppo: str, scores: Sequence[float], judge: str = "judge") -> None:
        """Put an evaluation into the store: the SFT model's answers score 0."""
        prompts = [f"prompt {number}" for number in range(len(scores))]
        answers = [f"answer {number}" for number in range(len(scores))]
        base, kl = [0.0] * len(scores), [1.0] * len(scores)
        found = compare_models(prompts, answers, answers, base, list(scores), kl)
        self.publish(
            "eval",
            key,
            {"result.json": found.to_json()},
            config={"ppo": {"lr": 1e-4}},
            parents={"ppo": ppo, "reward": judge},
            metrics=found.scalars(),
        )

    def fail(self, key: str, overrides: Sequence[str], error: str) -> None:
        """Record a run that failed before it left anything."""
        keys = {"sft": "shared", "ppo": key}
        record = RunRecord(
            "kl", "ppo", keys, (*BASE, *overrides), 0, status=Status.failed, error=error
        )
        self.records.write(record)


def rows_of(curve: Sequence[tuple[int, float, float]]) -> str:
    """Return `metrics.jsonl` of (step, validation reward, KL)."""
    rows = [
        {"global_step": step, "eval/reward_mean": reward, "eval/kl_sequence": kl}
        for step, reward, kl in curve
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def swept(folder: Path) -> Lab:
    """Two learning rates with three seeds each, and a seed of the second that failed.

    Objectives: 1, 2, 6 with 1e-4 (mean 3); 4, 5 with 1e-3 (mean 4.5).
    """
    lab = Lab(folder)
    lab.publish("sft", "shared", config={"sft": {}}, duration_s=100.0)
    objectives = {"1e-4": (1.0, 2.0, 6.0), "1e-3": (4.0, 5.0)}
    for lr, values in objectives.items():
        for seed, value in enumerate(values):
            curve = [(0, 0.0, 0.0), (4, value / 2, 1.0 + seed), (8, value, 4.0 * (1 + seed))]
            overrides = [f"ppo.lr={float(lr)}", f"ppo.seed={seed}"]
            lab.point(f"{lr.replace('-', '')}s{seed}", value, overrides, curve)
    lab.fail("bad", ["ppo.lr=1e-3", "ppo.seed=2"], "Traceback <b>\n  line 3\nCUDA out of memory")
    return lab
