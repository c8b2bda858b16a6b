"""PPO, RLOO, GRPO, REINFORCE++, DPO and best-of-n over one SFT model and one reward, over seeds.

    python benchmarks/algorithms.py
    python benchmarks/algorithms.py --tasks toy --seeds 2 --steps 32

On the bundled dialogues (`toy`, rewarded by the reward model) and sums (`arithmetic`, rewarded by
the rule that says what is right). The samplers make the same number of responses; each method is a
run of the experiment with another option of `ppo`, or `stage=dpo`. Runs that are done are not done
again: an interrupted benchmark goes on. The table and the picture of the frontier go to
`outputs/benchmarks/algorithms/`.

Numbers are those of the published weights on the test prompts; intervals are Student's t over
seeds, 95 %. Processor time and memory are the training stage's with its start, without SFT, reward
model and evaluation. Best-of-n samples when it answers: its time is that of an evaluation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from measured import ROOT, Usage, mean_and_interval, run_measured, stage_metrics

from rlhf_exp.report.chart import Chart, LineSeries
from rlhf_exp.report.run.charts import sheet
from rlhf_exp.report.sweep.data import intervals

ROLLOUTS = 128
COMMON = ("tracking=disabled", "distributed.threads=1", f"ppo.rollouts={ROLLOUTS}")
LENGTH = "response/length_mean"
REWARD, KL = "reward", "kl_sequence"
METHODS = ("ppo", "rloo", "grpo", "reinforce_pp", "dpo", "best_of")
MOST = 16
SIZES = (1, 2, 4, 8, MOST)
MORE_COLOURS = ".s4 { color: #9c7300; } .s5 { color: #1b1f24; }"
"""For the fifth and the sixth line; the sheet's own style has four."""


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        overrides: That choose the experiment.
        measure: Metric of the judge by rules, on which nothing was trained.
        name: Of that metric, for a reader.
    """

    overrides: tuple[str, ...]
    measure: str
    name: str


TASKS = {
    "toy": Task(("experiment=demo",), "gold", "gold judge"),
    "arithmetic": Task(("experiment=arithmetic",), "accuracy", "accuracy"),
}


@dataclass(frozen=True)
class Outcome:
    """A trained policy on the test prompts, beside SFT.

    Attributes:
        metrics: Of its evaluation; `/a` is SFT, `/b` the policy.
        tokens: Sampled while training.
        usage: Of the training stage.
    """

    metrics: dict[str, float]
    tokens: float = 0.0
    usage: Usage = field(default_factory=lambda: Usage(0.0, 0.0))


class Bench:
    """Runs of one task over one SFT model and one reward.

    Args:
        out: Folder of the task's store and readings.
        task: What is learned.
        changes: Further overrides.
    """

    def __init__(self, out: Path, task: Task, changes: Sequence[str]) -> None:
        self.out, self.task = out, task
        self.words = (*task.overrides, *COMMON, f"output_dir={out}", *changes)

    def run(self, method: str, seed: int) -> Outcome:
        """Train and evaluate, unless that is done; return the outcome."""
        reading = self.out / "readings" / f"{method}-{seed}.json"
        if reading.is_file():
            found = json.loads(reading.read_text(encoding="utf-8"))
            return Outcome(found["metrics"], found["tokens"], Usage(**found["usage"]))
        self._launch("name=base", "stage=reward", "eval=none")
        outcome = self._best_of(seed) if method == "best_of" else self._train(method, seed)
        reading.parent.mkdir(exist_ok=True)
        reading.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
        print(f"{self.out.name} {method}-{seed}: {outcome.usage.processor_s:.0f} s", flush=True)
        return outcome

    def _train(self, method: str, seed: int) -> Outcome:
        stage = "dpo" if method == "dpo" else "ppo"
        options = [] if method in ("dpo", "ppo") else [f"ppo={method}"]
        name = f"{method}-{seed}"
        words = (f"name={name}", *options, f"{stage}.seed={seed}", f"eval.seed={seed}")
        usage = self._launch(*words, f"stage={stage}", "eval=none")
        self._launch(*words, "stage=eval", f"eval.models=[sft,{stage}]")
        (metrics,) = stage_metrics(self.out, name, "eval")
        rows = stage_metrics(self.out, name, stage)
        lengths = [row[LENGTH] for row in rows if LENGTH in row]
        return Outcome(metrics, ROLLOUTS * sum(lengths), usage)

    def _best_of(self, seed: int) -> Outcome:
        name = f"best_of-{seed}"
        sizes = ",".join(map(str, SIZES))
        words = (f"name={name}", "stage=eval", "eval.models=[sft]", f"eval.seed={seed}")
        usage = self._launch(*words, f"eval.best_of=[{sizes}]")
        (metrics,) = stage_metrics(self.out, name, "eval")
        return Outcome(metrics, usage=usage)

    def _launch(self, *overrides: str) -> Usage:
        return run_measured(["launch.py", *self.words, *overrides], self.out / "log.txt")


@dataclass(frozen=True)
class Line:
    """A line of the table: numbers of each seed, or of SFT in each seed's evaluation."""

    name: str
    reward: Sequence[float]
    measure: Sequence[float]
    kl: Sequence[float]
    tokens: str = ""
    processor_s: str = ""
    peak_mib: str = ""


def lines_of(outcomes: Mapping[str, Sequence[Outcome]], task: Task) -> list[Line]:
    """Return the lines of a task's table, SFT first."""
    some = next(iter(outcomes.values()))
    lines = [Line("SFT", _of(some, f"{REWARD}/a"), _of(some, f"{task.measure}/a"), [0.0])]
    for method, results in outcomes.items():
        seconds = f"{np.mean([one.usage.processor_s for one in results]):.0f}"
        peak = f"{max(one.usage.peak_mib for one in results):.0f}"
        if method == "best_of":
            best = f"best_of/{MOST}"
            reward, measure, kl = (
                [one.metrics[f"{best}/{key}"] for one in results]
                for key in (REWARD, task.measure, "kl")
            )
            lines.append(Line(f"best of {MOST}", reward, measure, kl[:1], "", seconds, peak))
            continue
        tokens = np.mean([one.tokens for one in results])
        lines.append(
            Line(
                method,
                _of(results, f"{REWARD}/b"),
                _of(results, f"{task.measure}/b"),
                _of(results, f"{KL}/b"),
                f"{tokens / 1000:.0f} k" if tokens else "0",
                seconds,
                peak,
            )
        )
    return lines


def _of(results: Sequence[Outcome], key: str) -> list[float]:
    return [one.metrics[f"eval/{key}"] for one in results]


def table(lines: Sequence[Line], task: Task, seeds: int) -> str:
    """Return the Markdown table of a task."""
    head = (
        f"| {' '.join(task.overrides)}, {seeds} seeds | reward | {task.name} | KL, nats |"
        " tokens sampled | processor time, s | memory, MiB |\n|---|---|---|---|---:|---:|---:|"
    )
    rows = []
    for line in lines:
        numbers = [
            mean_and_interval(values) if len(values) > 1 else f"{values[0]:.2f}"
            for values in (line.reward, line.measure, line.kl)
        ]
        cells = (line.name, *numbers, line.tokens, line.processor_s, line.peak_mib)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *rows]) + "\n"


def frontier(outcomes: Mapping[str, Sequence[Outcome]], measure: str, title: str) -> Chart:
    """Return a measure against the root of the KL, with intervals; best-of-n is the curve."""
    drawn = []
    for colour, (method, results) in enumerate(outcomes.items()):
        if method == "best_of":
            kl = [results[0].metrics[f"best_of/{n}/kl"] for n in SIZES]
            means = [
                np.mean([one.metrics[f"best_of/{n}/{measure}"] for one in results]) for n in SIZES
            ]
            drawn.append(LineSeries("best of n", np.sqrt(kl), np.array(means), colour, last=""))
            continue
        kl = max(float(np.mean(_of(results, f"{KL}/b"))), 0.0)
        mean, low, high = intervals(np.array(_of(results, f"{measure}/b"))[:, None])
        point = np.sqrt([kl])
        drawn.append(LineSeries(method, point, mean, colour, whiskers=(low, high), last=""))
    return Chart(title, drawn, x_label="√KL, KL in nats per answer")


def main() -> None:
    """Run what is missing, print the tables and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=240, help="optimizer steps of those that sample")
    add("--changes", nargs="*", default=[], help="further overrides of all runs")
    add("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "algorithms")
    options = parser.parse_args()
    out = options.out.absolute()
    texts, charts = [], []
    for name in options.tasks:
        task = TASKS[name]
        bench = Bench(out / name, task, [f"ppo.steps={options.steps}", *options.changes])
        outcomes = {
            method: [bench.run(method, seed) for seed in range(options.seeds)]
            for method in options.methods
        }
        texts.append(table(lines_of(outcomes, task), task, options.seeds))
        charts += [
            frontier(outcomes, REWARD, f"{name}: reward"),
            frontier(outcomes, task.measure, f"{name}: {task.name}"),
        ]
    drawing = str(sheet(charts, columns=2)).replace("</style>", f"{MORE_COLOURS}</style>")
    (out / "algorithms.svg").write_text(drawing, encoding="utf-8")
    (out / "algorithms.md").write_text("\n".join(texts), encoding="utf-8")
    print("\n".join([*texts, f"{out / 'algorithms.md'}, algorithms.svg"]))


if __name__ == "__main__":
    main()
