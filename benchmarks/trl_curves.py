"""Learning curves of RLOO, GRPO and DPO: the native engine beside TRL, same data and rewards.

    python benchmarks/trl_curves.py --python .venv-trl-engine/bin/python

A small model learns from the toy dialogues: one SFT model and one reward model for all, three seeds
of each algorithm by each engine. Prints tables in Markdown: means over seeds with the half-width of
their 95 % interval (Student's t), of validation reward or accuracy and of the KL to SFT in nats.
Interrupted, it goes on where it was; `--out` is where the runs are.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf_exp  # noqa: E402 - of this checkout

SIZES = (
    "experiment=demo",
    "tracking=disabled",
    "eval=none",
    "distributed.threads=1",
    "model.architecture.layers=2",
    "model.architecture.width=64",
    "model.architecture.heads=4",
    "sft.steps=200",
    "sft.eval_every=200",
    "reward.epochs=0.5",
)
ROLLOUTS = (
    "stage=ppo",
    "ppo.rollouts=64",
    "ppo.batch=32",
    "ppo.epochs=2",
    "ppo.samples_per_prompt=8",
    "ppo.steps=32",
    "ppo.eval_every=8",
    "ppo.eval_prompts=48",
    "ppo.lr=1e-3",
    "ppo.train_blocks=null",
    "ppo.schedule=constant",
    "ppo.generation.max_new_tokens=24",
    "ppo.select=last",
)
RUNS = {
    "rloo": ("ppo=rloo", *ROLLOUTS),
    "grpo": ("ppo=grpo", *ROLLOUTS),
    "dpo": (
        "stage=dpo",
        "dpo.steps=32",
        "dpo.epochs=null",
        "dpo.eval_every=8",
        "dpo.eval_prompts=48",
        "dpo.lr=1e-3",
        "dpo.train_blocks=null",
        "dpo.generation.max_new_tokens=24",
        "dpo.select=last",
    ),
}
SHOWN = {
    "rloo": ("eval/reward_mean", "eval/kl_sequence"),
    "grpo": ("eval/reward_mean", "eval/kl_sequence"),
    "dpo": ("eval/accuracy", "eval/kl_sequence"),
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5 %, by number of seeds."""


def curve(overrides: list[str], out: Path, shown: tuple[str, str]) -> dict[int, dict[str, float]]:
    """Run what is not in the store; return the evaluations, by optimizer step."""
    with redirect_stdout(sys.stderr):  # the tables stay alone
        run = rlhf_exp.run(overrides, outputs=out)
    (folder,) = (path for stage, path in run.folders.items() if stage in ("ppo", "dpo"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["global_step"]: row for row in rows if shown[0] in row}


def interval(values: list[float]) -> str:
    """Return a mean and the half-width of its 95 % interval."""
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", required=True, help="an interpreter with TRL")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "trl_curves")
    parser.add_argument("--seeds", type=int, default=3, choices=T95)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=RUNS)
    arguments = parser.parse_args()
    engines = {"native": (), "trl": ("engine=trl", f"engine.python={arguments.python}")}
    for algorithm in arguments.only:
        stage = "dpo" if algorithm == "dpo" else "ppo"
        curves: dict[str, list[dict[int, dict[str, float]]]] = {}
        for engine, chosen in engines.items():
            for seed in range(arguments.seeds):
                named = (f"{stage}.seed={seed}", f"name={algorithm}-{engine}-{seed}")
                run = [*SIZES, *RUNS[algorithm], *chosen, *named]
                curves.setdefault(engine, []).append(curve(run, arguments.out, SHOWN[algorithm]))
        print(f"\n**{algorithm.upper()}**\n")
        shown = [metric.removeprefix("eval/") for metric in SHOWN[algorithm]]
        columns = [f"{metric}, {engine}" for metric in shown for engine in engines]
        print("| step | " + " | ".join(columns) + " |")
        print("|---:|" + "---|" * len(columns))
        for step in sorted(curves["native"][0]):
            cells = [
                interval([found[step][metric] for found in curves[engine]])
                for metric in SHOWN[algorithm]
                for engine in engines
            ]
            print(f"| {step} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
