"""Small runs of the training stages, by one process or by several that run this file.

Every process is started with torchrun's variables; it reads the jobs from a file and runs them one
after another, as a multirun in one Slurm task would.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from rlhf_exp.processes.failures import exit_after
from rlhf_exp.stages import dpo, ppo, reward, sft
from rlhf_exp.stages import eval as eval_stage
from rlhf_exp.stages.context import StageContext, StageJob
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.training.result import Interrupted
from tests.lab import ROOT, small_config

STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "eval": eval_stage}
PARENTS = {
    "sft": (),
    "reward": ("sft",),
    "dpo": ("sft",),
    "ppo": ("sft", "reward"),
    "eval": ("sft", "reward", "ppo"),
}


@dataclass
class Job:
    """One stage's run.

    Attributes:
        name: Its folder is `FOLDER/name`; run again, it resumes.
        stage: `sft`, `reward`, `dpo`, `ppo` or `eval`.
        overrides: Of the small config.
        models: The folders of the models it starts from, by role.
        stop_at: Optimizer step at which it is interrupted, as seen by one process only.
    """

    name: str
    stage: str
    overrides: list[str]
    models: dict[str, str] = field(default_factory=dict)
    stop_at: int | None = None


def run_job(folder: Path, job: Job, rank: int = 0) -> dict[str, float]:
    """Run a job in this process and return its metrics; `interrupted` if it was."""
    place = folder / job.name
    place.mkdir(parents=True, exist_ok=True)
    config = small_config(folder / "outputs", *job.overrides)
    asked = {"times": 0}

    @contextmanager
    def interrupts() -> Iterator[Callable[[], bool]]:
        def interrupted() -> bool:
            asked["times"] += 1
            return job.stop_at is not None and rank > 0 and asked["times"] >= job.stop_at

        yield interrupted

    chosen: Callable[[], AbstractContextManager[Callable[[], bool]]] = interrupts
    stage_job = StageJob(
        stage=job.stage,
        key=job.name,
        folder=str(place),
        cache=str(folder / "cache"),
        models=job.models,
        # By the models' folders: what is cached of one reward model is not another's.
        parents={role: job.models.get(role, "key") for role in PARENTS[job.stage]},
        inputs={role: job.models.get(role, "digest") for role in PARENTS[job.stage]},
    )
    context = StageContext(
        job=stage_job,
        materials=_materials(job.overrides),
        before_write=lambda: None,
        polite_interrupts=chosen,
    )
    try:
        return STAGES[job.stage].run(config, context).metrics
    except Interrupted:
        return {"interrupted": 1.0}


@lru_cache
def _data(overrides: tuple[str, ...]) -> DataModule:
    return DataModule(small_config(Path("unused"), *overrides).data)


def _materials(overrides: list[str]) -> DataModule:
    """Return the data, made once for all jobs of a process that share them."""
    return _data(tuple(text for text in overrides if text.startswith("data.")))


def run_jobs(folder: Path, jobs: Sequence[Job], processes: int, timeout: float = 280) -> None:
    """Run the jobs by several new processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.distributed.lab", str(folder)]
        errors = (folder / f"errors-{rank}.txt").open("w")
        workers.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors, stdout=errors)
        )
    deadline = time.monotonic() + timeout
    try:
        while any(worker.poll() is None for worker in workers):
            failed = [worker.returncode for worker in workers if worker.returncode]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    ends = [(folder / f"errors-{rank}.txt").read_text()[-4000:] for rank in range(processes)]
    assert all(worker.returncode == 0 for worker in workers), "\n\n".join(ends)


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    """Return the rows of `metrics.jsonl` of a job."""
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main(folder: Path) -> int:
    """Run the jobs as one of several processes, in a process group for each, as `workers` does."""
    import torch

    from rlhf_exp.distributed import deepspeed
    from rlhf_exp.processes.environment import find_launch_environment
    from rlhf_exp.processes.worker import open_store, process_group

    deepspeed.PERSISTENCE_THRESHOLD = 0  # all that these models have is below it
    place = find_launch_environment()
    assert place is not None
    store = open_store(place)
    for number, entry in enumerate(json.loads((folder / "jobs.json").read_text())):
        job = Job(**entry)
        torch.set_num_threads(1)
        with process_group(store, number, place):
            found = run_job(folder, job, place.rank)
        if place.rank == 0:
            (folder / job.name / "returned.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    exit_after(lambda: main(Path(sys.argv[1])))
