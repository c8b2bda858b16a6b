"""Our PPO beside trlx's on the same models, prompts, reward and settings, over seeds.

    python benchmarks/parity.py --trlx .venv-trlx/bin/python
    python benchmarks/parity.py --trlx .venv-trlx/bin/python --seeds 2 --steps 32 --ablations

The demo's SFT model and reward model are made once; then both engines train with each seed, in
turn. After that each deliberate difference between the two (docs/how-to/trlx.md) is taken out
of ours alone (`parity_ablations.py`), to show what it is worth. Runs that are done are not done
again: an interrupted benchmark goes on. Readings, tables and the picture go to
`outputs/benchmarks/parity/`.

Reward and KL are those of 200 validation prompts at the last step: both engines have sampled the
same number of responses there. Intervals are Student's t over seeds, 95 %, those of differences
over the pairs of a seed. Processor time is that of all processes, SFT and reward model left out;
memory is the largest process's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from measured import ROOT, Usage, mean_and_interval, run_measured, stage_metrics

from rlhf_exp.report.chart import Chart, LineSeries
from rlhf_exp.report.run.charts import sheet
from rlhf_exp.report.sweep.data import intervals

COMMON = ("experiment=demo", "tracking=disabled", "distributed.threads=1", "eval=none")
SIZES = ("ppo.eval_every=32", "ppo.eval_prompts=200", "ppo.checkpoint_every=10000")
REWARD, KL = "eval/reward_mean", "eval/kl_sequence"
# Settings under which a difference can show, where the demo's are not such.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "whitening": (),
    "value_head": (),
    "score_parts": (),
    "encoded_again": (),
    "end_token": (),
    "kl_controller": ("ppo.kl.target=1",),
    "weight_decay": ("ppo.weight_decay=0.1",),
}


@dataclass(frozen=True)
class Run:
    """What one run of PPO gave.

    Attributes:
        steps: Optimizer steps of the evaluations.
        reward: Mean raw reward on the validation prompts at each.
        kl: Mean KL of a response to SFT at each, in nats.
        processor_s: Of all its processes.
        peak_mib: Of the largest of them.
    """

    steps: list[float]
    reward: list[float]
    kl: list[float]
    processor_s: float
    peak_mib: float


class Bench:
    """Runs of PPO over one SFT model and one reward model.

    Args:
        out: Folder of readings and stores.
        steps: Optimizer steps of a run.
    """

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps = out, steps

    def run(self, kind: str, seed: int, ablation: str | None, *overrides: str) -> Run:
        """Train, unless that is done; return what it gave."""
        reading = self.out / f"{kind}-{seed}-{self.steps}.json"
        if reading.is_file():
            return Run(**json.loads(reading.read_text(encoding="utf-8")))
        store = self._store(ablation or "engines")
        name = f"{kind}-{seed}"
        words = (*COMMON, *SIZES, "stage=ppo", f"ppo.steps={self.steps}", f"ppo.seed={seed}")
        usage = self._launch(ablation, f"output_dir={store}", f"name={name}", *words, *overrides)
        rows = [row for row in stage_metrics(store, name, "ppo") if REWARD in row]
        found = Run(
            [row["global_step"] for row in rows],
            [row[REWARD] for row in rows],
            [row[KL] for row in rows],
            usage.processor_s,
            usage.peak_mib,
        )
        reading.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        print(f"{name}: reward {found.reward[-1]:.3f}, KL {found.kl[-1]:.2f}", flush=True)
        return found

    def _store(self, name: str) -> Path:
        """Return the folder of a store that has the SFT model and the reward model.

        An ablation has a store of its own: replaced code is no part of a key, and an unchanged
        run's result would be taken for the ablation's.
        """
        base, store = self.out / "stores" / "base", self.out / "stores" / name
        if not any((base / "store" / "reward").glob("*/manifest.json")):
            self._launch(None, f"output_dir={base}", "name=base", "stage=reward", *COMMON)
        if not store.is_dir():
            shutil.copytree(base, store, symlinks=True)
        return store

    def _launch(self, ablation: str | None, *overrides: str) -> Usage:
        ablations = "benchmarks/parity_ablations.py"
        program = ["launch.py"] if ablation is None else [ablations, ablation]
        return run_measured([*program, *overrides], self.out / "log.txt")


def table(head: str, kinds: Mapping[str, Sequence[Run]], against: str) -> str:
    """Return a Markdown table of kinds of runs; differences are to the kind `against`."""
    lines = [
        f"| {head} | seeds | reward | difference | KL, nats | difference | processor time, s |"
        " largest process, MiB |",
        "|---|---:|---|---|---|---|---:|---:|",
    ]
    base = kinds[against]
    for kind, runs in kinds.items():
        cells = [kind, str(len(runs))]
        for of in (lambda run: run.reward[-1], lambda run: run.kl[-1]):
            pairs = [of(run) - of(other) for run, other in zip(runs, base, strict=False)]
            own = mean_and_interval([of(run) for run in runs])
            cells += [own, "" if kind == against else mean_and_interval(pairs)]
        cells.append(f"{np.mean([run.processor_s for run in runs]):.0f}")
        cells.append(f"{max(run.peak_mib for run in runs):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(kinds: Mapping[str, Sequence[Run]]) -> str:
    """Return an SVG of reward and KL over steps, with intervals."""
    charts = []
    for title, field in (("Validation reward", "reward"), ("KL to SFT, nats", "kl")):
        lines = []
        for colour, (kind, runs) in enumerate(kinds.items()):
            mean, low, high = intervals(np.array([getattr(run, field) for run in runs]))
            x = np.array(runs[0].steps)
            lines.append(LineSeries(kind, x, mean, colour, whiskers=(low, high)))
        charts.append(Chart(title, lines))
    return str(sheet(charts))


def main() -> None:
    """Run what is missing, print the tables and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trlx", type=Path, default=ROOT / ".venv-trlx" / "bin" / "python", help="interpreter")
    add("--seeds", type=int, default=5, help="of the two engines; 2 at least")
    add("--ablation-seeds", type=int, default=3)
    add("--steps", type=int, default=160, help="optimizer steps, 16 of them an iteration")
    add("--ablations", nargs="*", choices=tuple(SETTINGS), default=list(SETTINGS))
    add("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "parity")
    options = parser.parse_args()
    out = options.out.absolute()
    bench, python = Bench(out, options.steps), f"engine.python={options.trlx.absolute()}"
    engines: dict[str, list[Run]] = {"native": [], "trlx": []}
    for seed in range(options.seeds):
        engines["native"].append(bench.run("native", seed, None))
        engines["trlx"].append(bench.run("trlx", seed, None, "engine=trlx", python))
    texts = [table("engine", engines, "native")]
    (out / "parity.svg").write_text(picture(engines), encoding="utf-8")
    for name in options.ablations:
        changed = SETTINGS[name]
        seeds = range(options.ablation_seeds)
        ours = [
            bench.run(f"native-{name}" if changed else "native", n, None, *changed) for n in seeds
        ]
        theirs = [bench.run(name, n, name, *changed) for n in seeds]
        heading = f"{name}, {' '.join(changed)}" if changed else name
        texts.append(table(heading, {"ours": ours, "as trlx": theirs}, "ours"))
    text = "\n".join(texts)
    (out / "parity.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{out / 'parity.md'}, parity.svg")


if __name__ == "__main__":
    main()
