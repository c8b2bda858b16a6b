"""Time, memory and learning of our PPO beside a peer's, alternating in one run.

    python benchmarks/ppo.py --model tiny --train top2 --sides native native-bf16 trl --rounds 5
    python benchmarks/ppo.py --model 30m --sides native native-bf16 generate generate-bf16
    python benchmarks/ppo.py --train all --sides native trl --learning --iterations 30

Sides: `native` (ours), `generate` (transformers' sampling, in this environment; then ours samples
only), `trl` (TRL 1.12.0's PPO trainer, in the environment that `bash benchmarks/setup_trl.sh`
makes); with `-bf16` behind it, a side computes in bfloat16. All sides load the same weights and
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
    as_json,
    check_equal_work,
    compare,
    learning_markdown,
    medians_markdown,
    ratios_markdown,
)
from side_by_side.worker import Worker, WorkerFailed, linear_rates, prepare

ROOT = Path(__file__).resolve().parent.parent
OURS, HALF = "native", "-bf16"
NAMES = [f"{name}{form}" for name in (OURS, "generate", "trl") for form in ("", HALF)]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    lines = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = lines.add_argument
    add("--model", choices=SHAPES, default="tiny", help="size of policy and reward model")
    add("--train", choices=TRAINED_BLOCKS, default="all", help="which parameters train")
    add("--sides", nargs="+", choices=NAMES, default=[OURS, "trl"], help="what to compare")
    add("--rounds", type=int, default=5, help="measured rounds of all sides, after one warm-up")
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
    """Start the workers of the sides asked for and return them by name."""
    sampling = any(side.startswith("generate") for side in options.sides)
    here = Path(sys.executable)
    commands = {
        OURS: (here, ["side_by_side.native_worker", "sample" if sampling else "iterate"]),
        "generate": (here, ["side_by_side.generate_worker"]),
        "trl": (options.trl_python, ["side_by_side.trl_worker"]),
    }
    workers = {}
    for side in options.sides:
        python, command = commands[side.removesuffix(HALF)]
        if not python.exists():
            raise SystemExit(f"{python} is missing: bash benchmarks/setup_trl.sh")
        told = replace(setting, precision="bfloat16" if side.endswith(HALF) else "float32")
        log = Path(f"{stem}-{side}.log")
        worker = Worker(side, python, command, told, log, options.threads)
        workers[side] = stack.enter_context(worker)
    return workers


def alternate(workers: dict[str, Worker], rounds: int) -> dict[str, list[Reading]]:
    """Return `rounds` readings of each worker, taken in turn: A B C A B C."""
    readings: dict[str, list[Reading]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, worker in workers.items():
            reading = worker.iterate()
            readings[name].append(reading)
            phases = "  ".join(f"{phase} {took:.2f} s" for phase, took in reading.seconds.items())
            score = "" if reading.reward is None else f"  reward {reading.reward:.3f}"
            print(f"{number + 1:3d} {name:13s} {phases}{score}", file=sys.stderr, flush=True)
        check_equal_work({name: readings[name][-1] for name in workers})
    return readings


def tabulate(
    readings: dict[str, list[Reading]], started: dict[str, int]
) -> tuple[str, dict[str, list[Row]]]:
    """Return the tables, and the rows by pair of sides, a peer's against one of ours."""
    pairs = {
        f"{peer} / {ours}": compare(readings[ours], readings[peer], started[ours], started[peer])
        for ours in readings
        for peer in readings
        if ours.startswith(OURS) and not peer.startswith(OURS)
    }
    tables = [medians_markdown(readings, started)]
    return "\n".join([*tables, *([ratios_markdown(pairs)] if pairs else [])]), pairs


def measure(
    options: argparse.Namespace, setting: Setting, stem: Path
) -> tuple[str, dict[str, Any]]:
    """Run the comparison and return its table and its figures."""
    rows: dict[str, list[Row]] = {}
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
        "rows": {pair: as_json(compared) for pair, compared in rows.items()},
        "started_bytes": started,
        "readings": {name: [asdict(one) for one in all_] for name, all_ in readings.items()},
    }
    return table, figures


def main() -> None:
    """Measure, print the table and write it."""
    options = parser().parse_args()
    if {side.removesuffix(HALF) for side in options.sides} >= {"generate", "trl"}:
        raise SystemExit("--sides: generate samples only, and trl trains: compare with one of them")
    kind = "learning" if options.learning else "speed"
    values = "-own-values" if options.own_values else ""
    values += "" if options.reward_blocks is None else f"-reward{options.reward_blocks}"
    sides = "-".join(options.sides)
    stem = options.out / f"ppo-{kind}-{options.model}-{options.train}-{sides}{values}"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ppo-benchmark-") as folder:
        setting = setting_of(options, folder)
        try:
            prepare(setting, options.threads)
            rates = linear_rates(setting, options.threads)
            table, figures = measure(options, setting, stem)
        except WorkerFailed as error:
            raise SystemExit(str(error)) from None
    limits = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in rates.items())
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, "
        f"load before {load:.1f}, linear layers {limits} GFLOP/s"
    )
    title = (
        f"{options.model}, {options.train}: {setting.rollouts} rollouts of "
        f"{setting.prompt_tokens}+{setting.response_tokens} tokens, {setting.epochs} epochs of "
        f"{setting.minibatches} minibatches ({machine})"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    written = {"setting": asdict(setting), "machine": machine, "rates": rates, **figures}
    stem.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(f"{title}\n\n{table}", encoding="utf-8")
    print(f"{title}\n\n{table}\n{stem.with_suffix('.md')}")


if __name__ == "__main__":
    main()
