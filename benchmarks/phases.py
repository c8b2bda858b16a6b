"""Seconds a phase takes with one process and with two, as a table.

    python benchmarks/phases.py
    python benchmarks/phases.py --rounds 5 --only "single, 1 thread;ddp"

On CPUs, the demo's model from scratch in float32, every layer training, sizes as in the demo: a
reading is a probe (`probe=true`) of all stages, whose second iteration counts. Settings take turns;
the table shows medians over the rounds. Processes have one thread each; one process is measured
with one thread and with two, since two threads are what two processes compete with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf_exp.config.compose import compose  # noqa: E402
from rlhf_exp.config.schema_keys import CONF  # noqa: E402
from rlhf_exp.pipeline.executor import executor_for  # noqa: E402
from rlhf_exp.pipeline.plan import plan  # noqa: E402
from rlhf_exp.pipeline.probe import ProbeResult, probe  # noqa: E402

SIZES = (
    "experiment=demo",
    "eval=none",
    "tracking=disabled",
    "sft.batch=32",
    "ppo.train_blocks=null",
    "ppo.rollouts=64",
    "ppo.eval_prompts=16",
)
SETTINGS = {
    "single, 1 thread": ("distributed=single", "distributed.threads=1"),
    "single, 2 threads": ("distributed=single", "distributed.threads=2"),
    **{
        name: (f"distributed={name}", "distributed.processes=2", "distributed.threads=1")
        for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    },
}
PHASES = ("time/rollout_s", "time/score_s", "time/assess_s", "time/update_s")
Seconds = dict[str, float]


def measure(name: str) -> Seconds:
    """Probe all stages; return the seconds of their phases."""
    with TemporaryDirectory() as folder:
        config = compose([f"output_dir={folder}", *SIZES, *SETTINGS[name]], [CONF]).config
        executor = executor_for(config, None)
        try:
            found = {
                one.stage: one for one in probe(config, plan(config), executor, lambda _: None)
            }
        except BaseException as error:
            executor.end(error)
            raise
        executor.end(None)
    return seconds(found)


def seconds(found: dict[str, ProbeResult]) -> Seconds:
    """Return the time of a step of SFT and reward model, and of the phases of PPO's iteration."""
    last = found["ppo"].phases("iteration")[-1]["metrics"]
    return {
        "SFT step": found["sft"].seconds("iteration"),
        "reward step": found["reward"].seconds("iteration"),
        **{phase.removeprefix("time/").removesuffix("_s"): last[phase] for phase in PHASES},
        "PPO iteration": found["ppo"].seconds("iteration"),
    }


def table(readings: dict[str, list[Seconds]]) -> str:
    """Return the medians; in brackets, how many times faster than `single, 1 thread`."""
    columns = list(next(iter(readings.values()))[0])
    middle = {
        name: {column: median(one[column] for one in found) for column in columns}
        for name, found in readings.items()
    }
    first = next(iter(middle.values()))
    lines = [f"| seconds | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, found in middle.items():
        cells = [f"{found[column]:.3f} ({first[column] / found[column]:.2f})" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, keep the readings, print the table."""
    lines = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lines.add_argument("--only", help="settings, separated by semicolons")
    lines.add_argument("--rounds", type=int, default=3, help="readings of each setting")
    lines.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "phases.json")
    options = lines.parse_args()
    names = options.only.split(";") if options.only else list(SETTINGS)
    readings: dict[str, list[Seconds]] = {name: [] for name in names}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(options.rounds):
        for name in names:
            readings[name].append(measure(name))
            options.out.write_text(json.dumps(readings, indent=1))
            print(name, readings[name][-1], file=sys.stderr, flush=True)
    print(table(readings))


if __name__ == "__main__":
    main()
