"""What PPO learns on the demo by each way to sample and compute, over seeds.

    python benchmarks/rollout_learning.py
    python benchmarks/rollout_learning.py --vllm .venv-vllm/bin/python --seeds 3 --steps 160

The demo's SFT model and reward model are made once, in float32; then PPO trains from them with each
seed in float32, in bfloat16, with rollouts one iteration ahead, and by vLLM where its interpreter
is given. All have sampled the same number of responses when they are compared. Runs that are done
are not done again. Readings, the table and the picture go to `outputs/benchmarks/learning/`.

Reward and KL are those of 200 validation prompts at the last step; intervals are Student's t over
seeds, 95 %, those of differences over the pairs of a seed. Memory and processor time leave vLLM's
own process out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measured import ROOT
from parity import Bench, Run, picture, table

WAYS = {
    "float32": (),
    "bfloat16": ("distributed.precision=bfloat16",),
    "float32, one iteration ahead": ("ppo.generation.ahead=1",),
}


def main() -> None:
    """Run what is missing, print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vllm", type=Path, help="interpreter that has vLLM")
    add("--seeds", type=int, default=3, help="2 at least")
    add("--steps", type=int, default=160, help="optimizer steps, 16 of them an iteration")
    add("--only", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    add("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "learning")
    options = parser.parse_args()
    out = options.out.absolute()
    bench = Bench(out, options.steps)
    ways = {name: WAYS[name] for name in options.only}
    if options.vllm is not None:
        python = f"ppo.generation.python={options.vllm.absolute()}"
        ways["vLLM, float32"] = ("ppo.generation.engine=vllm", python)
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, overrides in ways.items():
            kind = name.replace(", ", "-").replace(" ", "-")
            base = ("sft.use=base", "reward.use=base")
            runs[name].append(bench.run(kind, seed, None, *base, *overrides))
    text = table("way", runs, next(iter(ways)))
    (out / "learning.svg").write_text(picture(runs), encoding="utf-8")
    (out / "learning.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{out / 'learning.md'}, learning.svg")


if __name__ == "__main__":
    main()
