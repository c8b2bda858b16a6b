"""Peak memory of two processes beside what the plan estimates, as a table.

    python benchmarks/memory.py
    python benchmarks/memory.py --only "ddp;fsdp"
    python benchmarks/memory.py --again

On CPUs, in float32, with a random model of 13 M parameters: tensors then weigh more than libraries.
Each line is a probe (`probe=true`) by a started worker. Its libraries are what is resident before
anything is loaded, after a first stage that is thrown away, for much is imported on first use. The
allocator gives freed tensors back at once (`MALLOC_MMAP_THRESHOLD_`), or its reserves would be
measured. `--again` makes the table of the last readings, without measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf_exp.config.compose import compose  # noqa: E402
from rlhf_exp.config.experiment import Config  # noqa: E402
from rlhf_exp.config.schema_keys import CONF  # noqa: E402
from rlhf_exp.pipeline.executor import executor_for  # noqa: E402
from rlhf_exp.pipeline.plan import plan  # noqa: E402
from rlhf_exp.pipeline.plan_table import shape_for, stage_memory  # noqa: E402
from rlhf_exp.pipeline.probe import ProbeResult, probe  # noqa: E402

SIZES = (
    "tracking=disabled",
    "distributed.threads=1",
    "model.architecture.layers=5",
    "model.architecture.width=640",
    "model.architecture.heads=10",
    "model.architecture.vocabulary=512",
    "model.architecture.context=128",
    "data.toy.demonstrations=40",
    "data.toy.preferences=40",
    "data.toy.prompts=20",
    "data.toy.validation=4",
    "data.toy.test=4",
    "sft.steps=8",
    "sft.epochs=null",
    "sft.batch=4",
    "sft.seq_length=64",
    "reward.steps=8",
    "reward.epochs=null",
    "reward.batch=4",
    "reward.seq_length=64",
    "ppo.steps=8",
    "ppo.rollouts=4",
    "ppo.batch=4",
    "ppo.epochs=1",
    "ppo.seq_length=64",
    "ppo.eval_prompts=2",
    "ppo.generation.max_new_tokens=8",
    "ppo.generation.batch=4",
)
TOP = ("sft.train_blocks=2", "reward.train_blocks=2", "ppo.train_blocks=2")
CHECKPOINTING = tuple(f"{stage}.gradient_checkpointing=true" for stage in ("sft", "reward", "ppo"))
SETTINGS = {
    "ddp": ("distributed=ddp",),
    "ddp, checkpointing": ("distributed=ddp", *CHECKPOINTING),
    "ddp, top 2 blocks": ("distributed=ddp", *TOP),
    "zero1": ("distributed=zero1",),
    "zero2": ("distributed=zero2",),
    "zero2_bf16, top 2 blocks": ("distributed=zero2_bf16", *TOP),
    "zero3": ("distributed=zero3",),
    "zero3_offload": ("distributed=zero3_offload",),
    "fsdp": ("distributed=fsdp",),
    "fsdp, checkpointing": ("distributed=fsdp", *CHECKPOINTING),
}
MIB = 1 << 20


def config_of(name: str, folder: str = "outputs") -> Config:
    """Return the config of a setting."""
    return compose([f"output_dir={folder}", "eval=none", *SIZES, *SETTINGS[name]], [CONF]).config


def measure(name: str) -> list[ProbeResult]:
    """Probe all stages."""
    with TemporaryDirectory() as folder:
        config = config_of(name, folder)
        steps = plan(config)
        executor = executor_for(config, None)
        try:
            found = list(probe(config, [steps[0], *steps], executor, print))
        except BaseException as error:
            executor.end(error)
            raise
        executor.end(None)
    return found[1:]


def row(name: str, found: ProbeResult) -> str:
    """Return the table's line of one stage."""
    config = config_of(name)
    estimate = stage_memory(config, found.stage, shape_for(config.model))
    planned = (estimate.peak + estimate.host) / MIB
    ranks = range(len(found.processes))
    libraries = [one["libraries"] for one in found.processes]
    parts = {
        phase: max(found.peak("host", rank, phase) - libraries[rank] for rank in ranks) / MIB
        for phase in ("iteration", "evaluation", "end")
    }
    measured = max(parts["iteration"], parts["evaluation"])
    error = planned / measured - 1
    return (
        f"| {name} | {found.stage} | {planned:.0f} | {measured:.0f} | {error:+.0%} | "
        f"{parts['end']:.0f} |"
    )


def main() -> None:
    """Measure what is asked for, keep the readings, print the table."""
    lines = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lines.add_argument("--only", help="settings, separated by semicolons")
    lines.add_argument("--again", action="store_true", help="from the readings of the last time")
    lines.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "memory.json")
    options = lines.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if not options.again:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(256 << 10)
        os.environ["MALLOC_ARENA_MAX"] = "2"
        for name in options.only.split(";") if options.only else SETTINGS:
            kept[name] = [asdict(found) for found in measure(name)]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(kept))
    print("| setting | stage | estimate | measured | error | end of the stage |")
    print("|---|---|---|---|---|---|")
    for name in SETTINGS:
        for values in kept.get(name, ()):
            print(row(name, ProbeResult(**values)))


if __name__ == "__main__":
    main()
