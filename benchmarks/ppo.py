"""Time, memory and learning of our PPO beside a peer's, alternating in one run.

    python benchmarks/ppo.py --model tiny --train top2 --peer trl --rounds 5
    python benchmarks/ppo.py --model 30m --peer generate
    python benchmarks/ppo.py --train all --peer trl --learning --iterations 30

Peers: `generate` (transformers' sampling, in this environment) and `trl` (TRL 1.10.0's PPO trainer,
in the environment that `bash benchmarks/setup_trl.sh` makes). Both sides load the same weights and
prompts and make responses of the same length. Tables and every reading go to `outputs/benchmarks/`.
Measure on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from side_by_side.protocol import Reading
from side_by_side.setting import SHAPES, TRAINED_BLOCKS, Setting
from side_by_side.summary import (
    Row,
    alone_markdown,
    as_json,
    check_equal_work,
    compare,
    learning_markdown,
    markdown,
)
from side_by_side.worker import Worker, WorkerFailed, prepare

ROOT = Path(__file__).resolve().parent.parent
OURS = "rlhf_exp"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    lines = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = lines.add_argument
    add("--model", choices=SHAPES, default="tiny", help="size of policy and reward model")
    add("--train", choices=TRAINED_BLOCKS, default="all", help="which parameters train")
    add("--peer", choices=("generate", "trl"), default="trl", help="what to compare with")
    add("--only", choices=("ours", "peer"), help="measure one side alone, to look into it")
    add("--rounds", type=int, default=5, help="measured pairs, after one warm-up")
    add("--learning", action="store_true", help="compare rewards after equal samples instead")
    add("--iterations", type=int, default=30, help="of --learning")
    add("--lr", type=float, default=3e-4, help="learning rate of --learning")
    add(
        "--own-values",
        action="store_true",
        help="give our value function weights of its own, as the peer's has",
    )
    add(
        "--reward-blocks",
        type=int,
        help="blocks of the reward model that are its own, the rest being the policy's (all)",
    )
    add("--rollouts", type=int, default=64, help="responses an iteration")
    add("--prompt-tokens", type=int, default=80)
    add("--response-tokens", type=int, default=40)
    add("--epochs", type=int, default=4)
    add("--minibatches", type=int, default=4, help="optimizer steps an epoch")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count() or 1, help="of torch, on either side")
    add("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    add("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="folder for the results")
    return lines


def setting_of(options: argparse.Namespace, folder: str) -> Setting:
    """Return what both sides are told."""
    setting = Setting(
        folder=folder,
        model=options.model,
        train=options.train,
        rollouts=options.rollouts,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        epochs=options.epochs,
        minibatches=options.minibatches,
        prompts=4 * options.rollouts,
        seed=options.seed,
        own_values=options.own_values,
        reward_blocks=options.reward_blocks,
    )
    return replace(setting, counted_reward=True, lr=options.lr) if options.learning else setting


def start(
    options: argparse.Namespace, setting: Setting, stem: Path, stack: ExitStack
) -> dict[str, Worker]:
    """Start the workers asked for and return them by name, ours first."""
    here = Path(sys.executable)
    sides = {}
    if options.only != "peer":
        what = "sample" if options.peer == "generate" else "iterate"
        sides[OURS] = (here, ["side_by_side.native_worker", what])
    if options.only != "ours" and options.peer == "generate":
        sides["generate"] = (here, ["side_by_side.generate_worker"])
    elif options.only != "ours":
        if not options.trl_python.exists():
            raise SystemExit(f"{options.trl_python} is missing: bash benchmarks/setup_trl.sh")
        sides["trl"] = (options.trl_python, ["side_by_side.trl_worker"])
    return {
        name: stack.enter_context(
            Worker(name, python, command, setting, Path(f"{stem}-{name}.log"), options.threads)
        )
        for name, (python, command) in sides.items()
    }


def alternate(workers: dict[str, Worker], rounds: int) -> dict[str, list[Reading]]:
    """Return `rounds` readings of each worker, taken in turn: A B A B."""
    readings: dict[str, list[Reading]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, worker in workers.items():
            reading = worker.iterate()
            readings[name].append(reading)
            phases = "  ".join(f"{phase} {took:.2f} s" for phase, took in reading.seconds.items())
            score = "" if reading.reward is None else f"  reward {reading.reward:.3f}"
            print(f"{number + 1:3d} {name:9s} {phases}{score}", file=sys.stderr, flush=True)
        if len(workers) == 2:
            check_equal_work(*(readings[name][-1] for name in workers))
    return readings


def tabulate(readings: dict[str, list[Reading]], started: dict[str, int]) -> tuple[str, list[Row]]:
    """Return the table of one side, or of both with its rows."""
    if len(readings) == 1:
        ((name, alone),) = readings.items()
        return alone_markdown(alone, name), []
    ours, peer = readings
    rows = compare(readings[ours], readings[peer], started[ours], started[peer])
    return markdown(rows, ours, peer), rows


def measure(
    options: argparse.Namespace, setting: Setting, stem: Path
) -> tuple[str, dict[str, Any]]:
    """Run the comparison and return its table and its figures."""
    rows: list[Row] = []
    with ExitStack() as stack:
        workers = start(options, setting, stem, stack)
        started = {name: worker.started_bytes for name, worker in workers.items()}
        if options.learning:
            readings = alternate(workers, options.iterations)
            table = learning_markdown(readings, max(1, options.iterations // 10))
        else:
            alternate(workers, 1)  # warm-up
            readings = alternate(workers, options.rounds)
            table, rows = tabulate(readings, started)
    figures = {
        "rows": as_json(rows),
        "started_bytes": started,
        "readings": {name: [asdict(one) for one in all_] for name, all_ in readings.items()},
    }
    return table, figures


def main() -> None:
    """Measure, print the table and write it."""
    options = parser().parse_args()
    kind = "learning" if options.learning else "speed"
    values = "-own-values" if options.own_values else ""
    values += "" if options.reward_blocks is None else f"-reward{options.reward_blocks}"
    stem = options.out / f"ppo-{kind}-{options.model}-{options.train}-{options.peer}{values}"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ppo-benchmark-") as folder:
        setting = setting_of(options, folder)
        try:
            prepare(setting, options.threads)
            table, figures = measure(options, setting, stem)
        except WorkerFailed as error:
            raise SystemExit(str(error)) from None
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, "
        f"load before {load:.1f}"
    )
    title = (
        f"{options.model}, {options.train}: {setting.rollouts} rollouts of "
        f"{setting.prompt_tokens}+{setting.response_tokens} tokens, {setting.epochs} epochs of "
        f"{setting.minibatches} minibatches ({machine})"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    written = {"setting": asdict(setting), "machine": machine, **figures}
    stem.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(f"{title}\n\n{table}", encoding="utf-8")
    print(f"{title}\n\n{table}\n{stem.with_suffix('.md')}")


if __name__ == "__main__":
    main()
