"""In place of TRL's worker, run by this interpreter: does what it is told, without learning."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[3] / "rlhf_exp" / "engines" / "worker"))
from engine_line import WorkerChannel, rows

UPDATE = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "peak": 1.0, "time/update": 2.0}
PAIR = {f"rewards/{name}": 0.5 for name in ("accuracies", "chosen", "rejected", "margins")}
ANSWER = [40, 41, 42]


class StandIn:
    def __init__(self, line: WorkerChannel, plan: dict[str, Any]) -> None:
        self.line, self.plan = line, plan
        self.weights = load_file(Path(plan["model"]) / "model.safetensors")
        self.validation = rows(plan["validation"])

    def evaluate(self, step: int) -> None:
        ids = [[*ANSWER, self.plan["end_ids"][0]]] * len(self.validation)
        said: dict[str, Any] = {"kl": [0.01 * step] * len(ids)}
        if self.plan["algorithm"] == "dpo":
            said |= {
                "ids": ids,
                "ratios": [[0.1 * step, 0.0]] * len(rows(self.plan["validation_pairs"])),
            }
        else:
            index = [row["index"] for row in self.validation]
            self.line.ask(kind="score", evaluation=True, index=index, ids=ids)
        if self.line.ask(kind="evaluated", step=step, **said)["save"]:
            save_file(self.weights, self.plan["weights"])

    def sample(self, index: list[int]) -> None:
        size = self.plan["arguments"]["num_generations"]
        group = [row for row in index for _ in range(size)]
        told = self.line.ask(kind="score", evaluation=False, index=group, ids=[ANSWER] * len(group))
        assert len(told["scores"]) == len(group)
        stats = {"time/sample": 0.5, "time/score": 0.25}
        self.line.send(kind="log", step=0, stats=stats)
        self.line.send(kind="experience", seconds=1.0, kl=[0.0] * len(group))

    def run(self) -> None:
        plan, steps = self.plan, self.plan["arguments"]["max_steps"]
        self.line.send(kind="ready", parameters=10, trainable=4)
        self.evaluate(0)
        iterations = steps // plan["updates"]
        each = len(plan["order"]) // iterations
        for iteration in range(iterations):
            if plan["algorithm"] != "dpo":
                self.sample(plan["order"][iteration * each : (iteration + 1) * each])
            self.weights = {name: value + 0.5 for name, value in self.weights.items()}
            for update in range(1, plan["updates"] + 1):
                step = iteration * plan["updates"] + update
                if update == plan["updates"] and step % plan["eval_every"] == 0:
                    self.evaluate(step)
                self.line.send(kind="log", step=step, stats=UPDATE | PAIR)


line = WorkerChannel(int(sys.argv[1]))
told = line.ask(kind="hello", versions={"trl": "1.16.0", "torch": torch.__version__})
StandIn(line, json.loads(Path(told["plan"]).read_text())).run()
line.send(kind="done")
os._exit(0)
