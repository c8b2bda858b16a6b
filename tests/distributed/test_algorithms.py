"""DPO and the estimators without values: two processes of each strategy against one; minutes long.

All of a file's runs share one start of the processes, for that takes longer than the runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.lab import Job, rows, run_job, run_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
PPO = ("ppo.steps=4", "ppo.train_blocks=1", "ppo.micro_batch=1", "ppo.select=last")
# Two groups of 3, minibatches of 5 and 1: the second group lies in both processes.
GROUPS = (*PPO, "ppo.rollouts=6", "ppo.batch=5", "ppo.samples_per_prompt=3")
DPO = (
    "dpo.batch=5",  # the second process's share is filled up
    "dpo.epochs=null",
    "dpo.steps=4",
    "dpo.micro_batch=1",
    "dpo.select=last",
    "dpo.seq_length=128",
    "dpo.eval_every=2",
    "dpo.checkpoint_every=1",
    "dpo.eval_prompts=3",
    "dpo.generation.max_new_tokens=8",
)
RUNS = {
    "rloo": ("ppo", "ppo=rloo", *GROUPS),
    "grpo": ("ppo", "ppo=grpo", *GROUPS, "ppo.loss_mean=sequences"),
    "reinforce_pp": ("ppo", "ppo=reinforce_pp", *PPO, "ppo.rollouts=7"),
    "dpo-whole": ("dpo", *DPO, "dpo.gradient_checkpointing=true"),
    "dpo-packed": ("dpo", *DPO, "dpo.packing=true"),
    "dpo-top": ("dpo", *DPO, "dpo.train_blocks=1", "dpo.loss=ipo"),
    "dpo-top-packed": ("dpo", *DPO, "dpo.train_blocks=1", "dpo.packing=true"),
    "dpo-lora": ("dpo", *DPO, "dpo.lora.rank=4", "dpo.length_normalised=true"),
    "dpo-lora-packed": ("dpo", *DPO, "dpo.lora.rank=4", "dpo.packing=true"),
}
"""The stage of each run, and its overrides."""
COMMON = ("sft.steps=4", "reward.steps=4", "distributed.threads=1")
CUT = ("rloo", "dpo-whole", "dpo-packed", "dpo-lora")
"""Runs that are interrupted, too, and go on."""


def job(folder: Path, name: str, stage: str, *overrides: str, stop_at: int | None = None) -> Job:
    """Return a job that starts from the models which one process made."""
    models = {role: str(folder / f"single-{role}" / "model") for role in ("sft", "reward")}
    return Job(name, stage, [*COMMON, *overrides], models, stop_at)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two: `STRATEGY-RUN`, and `STRATEGY-RUN-cut` interrupted."""
    folder = tmp_path_factory.mktemp("algorithms")
    torch.set_num_threads(1)
    for stage in ("sft", "reward"):
        run_job(folder, job(folder, f"single-{stage}", stage))
    for name, (stage, *overrides) in RUNS.items():
        run_job(folder, job(folder, f"single-{name}", stage, *overrides))
    jobs = []
    for strategy in STRATEGIES:
        for name, (stage, *overrides) in RUNS.items():
            chosen = (*overrides, f"distributed={strategy}")
            jobs.append(job(folder, f"{strategy}-{name}", stage, *chosen))
            for stop_at in (1, None) if name in CUT else ():
                jobs.append(job(folder, f"{strategy}-{name}-cut", stage, *chosen, stop_at=stop_at))
    run_jobs(folder, jobs, processes=2, timeout=800)
    return folder


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / name / "model" / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(folder: Path, strategy: str, name: str) -> None:
    one, two = rows(folder, f"single-{name}"), rows(folder, f"{strategy}-{name}")
    assert [row["global_step"] for row in one] == [row["global_step"] for row in two]
    families = ("loss", "eval", "reward", "kl", "optim", "policy", "dpo")
    compared = 0
    for ours, theirs in zip(one, two, strict=True):
        for metric in ours.keys() & theirs.keys():
            if metric.startswith(families):
                assert theirs[metric] == pytest.approx(ours[metric], rel=1e-4, abs=5e-5), metric
                compared += 1
    assert compared > 30
    trained = weights(folder, f"{strategy}-{name}")
    start = weights(folder, "single-sft")
    moved = 0.0
    for key, value in weights(folder, f"single-{name}").items():
        moved = max(moved, (value - start[key]).abs().max().item())
        # A key's bias moves all of a query's scores alike, so its gradient is rounding alone, which
        # Adam blows up to full steps.
        if not key.endswith("query_key_value.bias"):
            assert torch.allclose(value, trained[key], atol=5e-5), key
    assert moved > 1e-3


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interrupted_and_resumed_equals_never_interrupted(
    folder: Path, strategy: str, name: str
) -> None:
    """One process alone sees Ctrl-C; both stop, and end with the same weights, bit for bit."""
    whole, cut = (weights(folder, f"{strategy}-{name}{suffix}") for suffix in ("", "-cut"))
    assert whole.keys() == cut.keys()
    for key, value in whole.items():
        assert torch.equal(value, cut[key]), key
    compared = 0
    logs = [rows(folder, f"{strategy}-{name}{suffix}") for suffix in ("", "-cut")]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["global_step"] == theirs["global_step"]
        for metric in ours:
            if metric.startswith(("loss", "eval", "reward", "kl", "dpo")):
                assert theirs[metric] == ours[metric], metric
                compared += 1
    assert compared > 10


def test_packed_runs_are_the_unpacked_ones(folder: Path) -> None:
    for ours, theirs in zip(
        rows(folder, "single-dpo-whole"), rows(folder, "single-dpo-packed"), strict=True
    ):
        for metric in ours.keys() & theirs.keys():
            if metric.startswith(("loss", "eval", "dpo")):
                assert theirs[metric] == pytest.approx(ours[metric], rel=1e-4, abs=5e-5), metric
