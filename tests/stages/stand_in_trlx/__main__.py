"""In place of the trlx worker, run by this interpreter: does what it is told, without learning.

`STAND_IN_TRLX` says what goes wrong: `fails`, or `hangs` after its first evaluation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[3] / "rlhf_exp" / "engines" / "worker"))
from engine_line import WorkerChannel

UPDATE = {
    "losses/total_loss": 1.0,
    "losses/policy_loss": 0.5,
    "losses/value_loss": 0.5,
    "policy/clipfrac": 0.1,
    "policy/approx_kl": 0.01,
    "old_values/mean": 0.0,
    "values/clipfrac": 0.0,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "peak": 1.0,
    "time/update": 1.0,
}
ROLLOUT = {
    "kl_ctl_value": 0.05,
    "policy/sqrt_kl": 0.1,
    "rollout_scores/running_std": 1.0,
    "time/rollout_generate": 0.1,
    "time/rollout_score": 0.1,
}
ANSWER = [40, 41, 42]


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class StandIn:
    def __init__(self, line: WorkerChannel, plan: dict) -> None:
        self.line, self.plan = line, plan
        train = plan["config"]["train"]
        self.steps, self.every = train["total_steps"], train["eval_interval"]
        model = Path(plan["config"]["model"]["model_path"]) / "pytorch_model.bin"
        self.weights = torch.load(model, weights_only=True)

    def score(self, index: list[int], evaluation: bool) -> None:
        told = self.line.ask(
            kind="score",
            evaluation=evaluation,
            index=index,
            ids=[ANSWER] * len(index),
            ended=[True] * len(index),
        )
        assert len(told["scores"]) == len(index)

    def evaluate(self, step: int) -> None:
        validation = rows(self.plan["validation"])
        self.score([row["index"] for row in validation], evaluation=True)
        told = self.line.ask(kind="evaluated", step=step, kl=[0.01 * step] * len(validation))
        if told["save"]:
            save_file(self.weights, self.plan["weights"])

    def run(self) -> None:
        self.line.send(kind="ready", parameters=10, trainable=4)
        rollouts = self.plan["config"]["method"]["num_rollouts"]
        order = list(self.plan["order"])
        for step in range(0, self.steps, self.every):
            for size in self.plan["sizes"]:
                self.score([order.pop(0) for _ in range(size)], evaluation=False)
            self.line.send(kind="log", step=step, stats=ROLLOUT)
            self.line.send(kind="experience", seconds=1.0, kl=[0.0] * rollouts)
            if step == 0:
                self.evaluate(0)
                if os.environ.get("STAND_IN_TRLX") == "fails":
                    raise ValueError("as told")
                if os.environ.get("STAND_IN_TRLX") == "hangs":
                    Path(self.plan["weights"]).with_name("pid").write_text(str(os.getpid()))
                    time.sleep(600)
            for number in range(step + 1, step + self.every + 1):
                if number == step + self.every:
                    self.weights = {name: value + 0.5 for name, value in self.weights.items()}
                    self.evaluate(number)
                self.line.send(kind="log", step=number, stats=UPDATE)
        assert not order


line = WorkerChannel(int(sys.argv[1]))
told = line.ask(kind="hello", versions={"trlx": "0.7.0", "torch": torch.__version__})
try:
    StandIn(line, json.loads(Path(told["plan"]).read_text())).run()
    line.send(kind="done")
except ValueError as error:
    line.send(kind="failed", error=repr(error), traceback="Traceback: of the stand-in")
os._exit(0)
