"""Estimates for GPUs from the written model of operations and bytes, as tables.

    python benchmarks/estimates.py
    python benchmarks/estimates.py --write docs/background/benchmarks.md

Nothing is measured: `rlhf_exp/models/time_estimate.py` says what must be computed and read, and the
rates below say how fast. `python benchmarks/gpu.py` measures the same on a GPU. `--write` puts the
tables between the marks in a page.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf_exp.config.compose import compose  # noqa: E402
from rlhf_exp.config.schema_keys import CONF  # noqa: E402
from rlhf_exp.models.architecture import Architecture  # noqa: E402
from rlhf_exp.models.time_estimate import (  # noqa: E402
    PHASES,
    Iteration,
    Models,
    Work,
    decode_step,
    iteration_work,
)
from rlhf_exp.pipeline.iteration_time import models_of, sizes_of  # noqa: E402
from rlhf_exp.pipeline.plan_table import shape_for  # noqa: E402

BEGIN, END = "<!-- estimates: begin -->", "<!-- estimates: end -->"


@dataclass(frozen=True)
class Gpu:
    """A GPU's reachable rates: data sheet, less what kernels do not reach.

    Attributes:
        name: its name.
        flops: bfloat16 operations a second of large matrix products.
        bandwidth: bytes a second.
    """

    name: str
    flops: float
    bandwidth: float


A100_40 = Gpu("A100 40 GB", 250e12, 1.40e12)
A100 = Gpu("A100 80 GB", 250e12, 1.83e12)
H200 = Gpu("H200", 790e12, 4.3e12)

REACHED = {"decode": 0.6, "prefill": 0.5, "forward": 0.4, "backward": 0.4, "optimizer": 0.8}
"""The share of its limit that each part of an iteration reaches; others, `OTHERS`."""
OTHERS = 0.5

GPTJ = Architecture("gptj", 28, 4096, 16, 16384, 50400, 2048)
LLAMA_8B = Architecture("llama", 32, 4096, 32, 14336, 128256, 8192, kv_heads=8)
OPT_350M = Architecture("gpt2", 24, 1024, 16, 4096, 50272, 2048, tied=True)
OPT_1_3B = Architecture("gpt2", 24, 2048, 32, 8192, 50272, 2048, tied=True)
OPT_6_7B = Architecture("gpt2", 32, 4096, 32, 16384, 50272, 2048, tied=True)


def seconds(parts: Mapping[str, Work], gpu: Gpu, reached: bool) -> float:
    """Return the time of a phase: at the GPU's limits, or at the shares that are reached."""
    return sum(
        part.seconds(gpu.flops, gpu.bandwidth) / (REACHED.get(name, OTHERS) if reached else 1.0)
        for name, part in parts.items()
    )


def decode_table() -> str:
    """Return a table of decode steps with 512 tokens before each new one."""
    lines = [
        "| decode, 512 tokens before | GPU | GB a step | ms a step at the limit | tokens/s at the "
        "limit | at 60 % |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, shape, rows in (
        ("GPT-J 6B, 64 rows", GPTJ, 64),
        ("GPT-J 6B, 192 rows", GPTJ, 192),
        ("Llama 8B, 64 rows", LLAMA_8B, 64),
        ("Llama 8B, 448 rows", LLAMA_8B, 448),
    ):
        step = decode_step(shape, rows, 512, 2)
        for gpu in (A100, H200):
            took = step.seconds(gpu.flops, gpu.bandwidth)
            cells = [f"{step.bytes / 1e9:.1f}", f"{took * 1e3:.1f}", f"{rows / took:,.0f}"]
            cells.append(f"{0.6 * rows / took:,.0f}")
            lines.append(f"| {name} | {gpu.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def recipe_table(prompt: int, response: int) -> str:
    """Return a table of an iteration of the recipe with GPT-J, rows of one length."""
    eight = (
        "ppo.reward.placement=shared",
        "distributed.processes=8",
        "ppo.batch=32",
        "ppo.rollouts=512",
    )
    one = (
        "ppo.reward.placement=shared",
        "distributed=single",
        "distributed.processes=1",
        "distributed.precision=bfloat16",
        "ppo.generation.batch=192",
    )
    over_trunk = ("reward.train_blocks=2",)
    columns = {
        "8 x A100, reward model on the eighth": (A100, ()),
        "8 x A100, one in each": (A100, eight),
        "8 x A100, over the trunk": (A100, (*eight, *over_trunk)),
        "1 x H200": (H200, one),
        "1 x H200, over the trunk": (H200, (*one, *over_trunk)),
    }
    lines = [
        f"| seconds, {prompt}+{response} tokens | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    cells: dict[str, list[str]] = {name: [] for name in (*PHASES, "**iteration**")}
    for gpu, overrides in columns.values():
        config = compose(["experiment=hh_gptj_6b", *overrides], [CONF]).config
        shape = shape_for(config.model)
        assert shape is not None
        work = iteration_work(models_of(config, shape), sizes_of(config, prompt, response))
        # A reward model on a device of its own scores the rows of all.
        alone = config.distributed.processes if config.ppo.reward.device else 1
        least = total = 0.0
        for name in PHASES:
            times = alone if name == "scoring" else 1
            limit, taken = (times * seconds(work[name], gpu, reached) for reached in (False, True))
            least, total = least + limit, total + taken
            cells[name].append(f"{taken:.1f} ({limit:.1f})")
        cells["**iteration**"].append(f"**{total:.1f}** ({least:.1f})")
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    return "\n".join(lines) + "\n"


def chat_table() -> str:
    """Return a table of DeepSpeed-Chat's published rows: 256 + 256 tokens, one epoch."""
    lines = [
        "| pairs/s on one GPU, 256+256 tokens | published | A100 80 GB | H200 |",
        "|---|---:|---:|---:|",
    ]
    sizes = Iteration(
        rows=64,
        prompt=256,
        response=256,
        decoded_rows=64,
        scored_rows=64,
        epochs=1,
        updates=1,
        micro_batch=8,
    )
    for name, shape, lora, published in (
        ("OPT 1.3B's shape, every layer", OPT_1_3B, 0, "3.13"),
        ("OPT 6.7B's shape, LoRA of rank 128", OPT_6_7B, 128, "0.90"),
    ):
        actor = Models(shape, None, lora, reward=OPT_350M, weight_bytes=2)
        work = iteration_work(actor, sizes)
        # The critic is a model of 350 M parameters whose head has one output.
        critic = Models(replace(OPT_350M, vocabulary=1, tied=False), weight_bytes=2)
        values = iteration_work(critic, sizes)
        parts = [*work.values(), values["updating"], {"values": values["assessing"]["policy"]}]
        cells = [
            f"{sizes.rows / sum(seconds(one, gpu, reached=True) for one in parts):.2f}"
            for gpu in (A100, H200)
        ]
        lines.append(
            f"| {name}, reward and critic 350M | {published} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def update_table() -> str:
    """Return a table of updates with every layer: seconds of 64 rows of 512 tokens."""
    lines = [
        "| update, every layer, 64 rows of 384+128 tokens | TFLOP | A100 80 GB | H200 |",
        "|---|---:|---:|---:|",
    ]
    sizes = Iteration(64, 384, 128, 64, 64, 1, 1, 4)
    for name, shape in (("GPT-J 6B", GPTJ), ("Llama 8B", LLAMA_8B)):
        models = Models(shape, weight_bytes=2, skips_masked=shape.type != "gptj")
        parts = iteration_work(models, sizes)["updating"]
        cells = [f"{seconds(parts, gpu, reached=True):.1f} s" for gpu in (A100, H200)]
        flops = sum(part.flops for part in parts.values())
        lines.append(f"| {name} | {flops / 1e12:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables() -> str:
    """Return all tables."""
    return "\n".join(
        [
            decode_table(),
            recipe_table(384, 128),
            recipe_table(200, 100),
            update_table(),
            chat_table(),
        ]
    )


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page that has the marks")
    page: Path | None = parser.parse_args().write
    if page is None:
        print(tables())
        return
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}")
    filled = pattern.sub(lambda _: f"{BEGIN}\n{tables()}{END}", text)
    page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
