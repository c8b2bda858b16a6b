"""What the frame around training costs: `launch.py` against the bare loop, per run and per step.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --stages ppo --pairs 1 --more

Both train the demo's model on the demo's data with the same engine, one thread. *Framed* is
`python launch.py`: Hydra, checks, plan, lease, W&B offline, `metrics.jsonl`, progress, checkpoints,
publication, record and report. *Bare* is a script that has been handed the settings: it loads data
and model, evaluates at the start and the end, steps the optimizer in between, and saves the model.

Each pair runs both at two lengths, in turn, as whole processes, and takes seconds on the clock and
of processors (W&B's own process included), which other work on the machine disturbs less. Short
runs differ by what every run costs; what a longer run adds is the steps. The second table is
measured inside a framed run: the seconds that the parts of the loop take which the bare loop does
not have. `--more` adds pairs to the last readings; `--again` only makes their table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

READINGS = ROOT / "outputs" / "benchmarks" / "overhead.json"
NEVER = 10**9
# Short and long, in optimizer steps; PPO takes 16 of them in an iteration.
LENGTHS = {"sft": (16, 64), "ppo": (16, 48)}
SIZES = {
    "experiment": "demo",
    "eval": "none",
    "distributed.threads": 1,
    "sft.steps": 20,
    "sft.eval_every": NEVER,
    "reward.steps": 5,
    "reward.epochs": "null",
    "ppo.eval_every": NEVER,
    "ppo.eval_prompts": 16,
}
PARTS = ("report", "snapshot_if_due", "checkpoint_if_due", "stop_if_interrupted")
Seconds = dict[str, float]


def overrides(outputs: Path, stage: str, steps: int, seed: int) -> list[str]:
    """Return the command line of a run that is in no store yet: its seed is new."""
    changes = {"output_dir": outputs, "stage": stage, f"{stage}.steps": steps}
    given = SIZES | changes | {f"{stage}.seed": seed}
    return [f"{name}={value}" for name, value in given.items()]


def timed(command: list[str]) -> tuple[float, float]:
    """Run a process to its end; return its seconds and those of processors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    began, used = time.perf_counter(), processors()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    took = time.perf_counter() - began, processors() - used
    assert done.returncode == 0, done.stderr.decode()
    return took


def processors() -> float:
    """Return the processor seconds of all processes that have ended."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def framed(outputs: Path, stage: str, steps: int, seed: int) -> tuple[float, float]:
    """Return the seconds of `launch.py`."""
    return timed([sys.executable, "launch.py", *overrides(outputs, stage, steps, seed)])


def bare(outputs: Path, stage: str, steps: int, seed: int) -> tuple[float, float]:
    """Return the seconds of a process that has nothing but the engine."""
    from rlhf_exp.config.compose import compose
    from rlhf_exp.config.schema_keys import CONF
    from rlhf_exp.pipeline.plan import plan

    config = compose(overrides(outputs, stage, steps, seed), [CONF]).config
    models = {
        step.stage: str(step.artifact.path / "model")
        for step in plan(config)
        if step.artifact is not None
    }
    with TemporaryDirectory() as folder:
        handed = Path(folder) / "config.pickle"
        handed.write_bytes(pickle.dumps((config, models)))
        return timed([sys.executable, __file__, "--bare", str(handed)])


def run_bare(handed: Path) -> None:
    """Train with the engine alone (what `--bare` does)."""
    import importlib

    from rlhf_exp.stages.context import StageContext, StageJob
    from rlhf_exp.stages.data_module import DataModule

    config, models = pickle.loads(handed.read_bytes())
    stage = importlib.import_module(f"rlhf_exp.stages.{config.stage.name}")
    stage.run_loop = bare_loop
    folder, cache = handed.parent / "work", Path(config.output_dir) / "cache"
    context = StageContext(
        job=StageJob(config.stage.name, "bare", str(folder), str(cache), models),
        materials=DataModule(config.data),
        before_write=lambda: None,
        polite_interrupts=lambda: None,  # type: ignore[arg-type,return-value]
    )
    stage.run(config, context)


def bare_loop(
    config: Any,  # noqa: ANN401 - as the stages' own
    section: Any,  # noqa: ANN401
    steps: int,
    task: Any,  # noqa: ANN401
    world: Any,  # noqa: ANN401
    context: object,
    watch: object,
    conclude: Callable[[Any], object],
) -> object:
    """Do what `training.trainer.train` does to the weights, and nothing else."""
    from rlhf_exp.training.optim import build_optimizer, set_lr
    from rlhf_exp.training.result import TrainingResult

    build = partial(build_optimizer, task.module, section)
    task.attach(world.prepare(task.module, build, section.grad_norm))
    task.evaluate()
    done = itertools.count()

    def update(losses: Iterable[Any]) -> None:
        set_lr(world.strategy.optimizer, section, next(done), steps)
        for loss in losses:
            world.backward(loss)
        world.strategy.step()

    for iteration in range(steps // task.updates):
        task.iterate(iteration, update)
    task.evaluate()
    world.release(None)
    outcome = TrainingResult({}, None, "", steps, steps, steps, None)
    conclude(outcome)  # saves the model
    return outcome


def inside(outputs: Path, stage: str, steps: int, seed: int) -> Seconds:
    """Run framed in this process; return the seconds a step takes in each part of the loop."""
    from rlhf_exp.hydra_app import main
    from rlhf_exp.tracking.progress_bar import StageProgress
    from rlhf_exp.training.ppo import PpoTask
    from rlhf_exp.training.task import SingleStepTask
    from rlhf_exp.training.trainer import _Trainer  # noqa: PLC2701 - its methods are timed

    spent: Seconds = {"update": 0.0, **dict.fromkeys((*PARTS, "progress"), 0.0)}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for part in PARTS:
        setattr(_Trainer, part, watched(part, getattr(_Trainer, part)))
    for task in (PpoTask, SingleStepTask):
        task.iterate = watched("update", task.iterate)  # type: ignore[method-assign]
    StageProgress.update = watched("progress", StageProgress.update)  # type: ignore[method-assign]
    assert main(overrides(outputs, stage, steps, seed)) == 0
    spent["update"] -= spent["progress"]
    return {name: value / steps for name, value in spent.items()}


def measure(outputs: Path, stage: str, pairs: int, found: dict[str, Any]) -> None:
    """Add the seconds of each process, and of the parts of a framed step."""
    short, long = LENGTHS[stage]
    for pair in range(pairs):
        seed = 1000 + pair
        order = [("framed", framed), ("bare", bare)]
        taken: dict[str, list[tuple[float, float]]] = {"framed": [], "bare": []}
        for steps in (short, long):
            for name, run in order if pair % 2 else reversed(order):
                # A bare run only plans; it comes to no result that a framed one could find.
                taken[name].append(run(outputs, stage, steps, seed))
                clock, used = taken[name][-1]
                print(
                    f"{stage} {name} {steps} steps: {clock:.2f} s, {used:.2f} of processors",
                    flush=True,
                )
        for name, seconds in taken.items():
            found[name].append(seconds)
    found["parts"].append(inside(outputs, stage, long, 999))


def table(readings: dict[str, dict[str, Any]]) -> str:
    """Return the tables of `docs/background/benchmarks.md`."""
    lines = ["| | bare | launch.py | overhead |", "|---|---:|---:|---|"]
    for stage, found in readings.items():
        short, long = LENGTHS[stage]
        for number, kind in enumerate(("", " of processors")):
            steps = {
                name: [(b[number] - a[number]) / (long - short) for a, b in found[name]]
                for name in ("bare", "framed")
            }
            runs = {name: [a[number] for a, _ in found[name]] for name in ("bare", "framed")}
            lines.append(_line(f"{stage}, {short} steps, seconds{kind}", runs, 1.0, "{:.2f}"))
            lines.append(_line(f"{stage}, ms{kind} per step", steps, 1000.0, "{:.1f}"))
    lines += [
        "",
        "| ms per step, in a framed run | the step itself | "
        + " | ".join(("logging", "kept weights", "checkpoints", "Ctrl-C", "progress"))
        + " | all, % |",
        "|---|" + "---:|" * 7,
    ]
    for stage, found in readings.items():
        parts = {name: median(one[name] for one in found["parts"]) for name in found["parts"][0]}
        extra = [parts[name] for name in (*PARTS, "progress")]
        numbers = [f"{1000 * value:.3f}" for value in (parts["update"], *extra)]
        share = 100 * sum(extra) / parts["update"]
        lines.append(f"| {stage} | {' | '.join(numbers)} | {share:.2f} |")
    return "\n".join(lines)


def _line(name: str, taken: dict[str, list[float]], scale: float, number: str) -> str:
    differences = sorted(
        scale * (framed - bare) for framed, bare in zip(taken["framed"], taken["bare"], strict=True)
    )
    middle = [scale * median(taken[one]) for one in ("bare", "framed")]
    cells = [number.format(one) for one in (*middle, median(differences))]
    low, high = (number.format(one) for one in (differences[0], differences[-1]))
    return f"| {name} | {cells[0]} | {cells[1]} | {cells[2]} ({low} to {high}) |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stages", default="sft,ppo")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--more", action="store_true", help="beside the last readings")
    parser.add_argument("--again", action="store_true", help="the table of the last readings")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare is not None:
        run_bare(given.bare)
        return
    readings = json.loads(READINGS.read_text()) if READINGS.is_file() else {}
    for stage in () if given.again else given.stages.split(","):
        with TemporaryDirectory() as folder:
            # What both build on: parents, tokenized data, scores of the data's own answers.
            framed(Path(folder), "reward" if stage == "sft" else "ppo", 5, 1)
            if not given.more or stage not in readings:
                readings[stage] = {"framed": [], "bare": [], "parts": []}
            measure(Path(folder), stage, given.pairs, readings[stage])
        READINGS.parent.mkdir(parents=True, exist_ok=True)
        READINGS.write_text(json.dumps(readings))
    print(table(readings))


if __name__ == "__main__":
    main()
