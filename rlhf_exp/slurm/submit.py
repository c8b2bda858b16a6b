"""Writes jobs for submitit to submit: resources, environment, and the command of each task."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from rlhf_exp.config.check_slurm import Shape
from rlhf_exp.config.slurm import SlurmConfig
from rlhf_exp.errors import UserError
from rlhf_exp.slurm.submission import Submission
from rlhf_exp.slurm.work import Work, perform

ENTRY = "rlhf_exp.slurm.job"


class _Executor(SlurmExecutor):
    """submitit's executor with our own first lines in each task."""

    @property
    def _submitit_command_str(self) -> str:
        # A task that Slurm gives notice before Python runs would die of it.
        deaf = """trap "" USR2; exec "$@" """.strip()
        program = str(super()._submitit_command_str).replace("submitit.core._submit", ENTRY)
        return f"sh -c {shlex.quote(deaf)} sh {program}"


def submit(
    site: SlurmConfig,
    shape: Shape,
    submission: Submission,
    works: Sequence[Work],
    name: str,
    after: Sequence[str] = (),
) -> list[str]:
    """Submit works as one array (one work: as one job); return Slurm's number of each.

    Args:
        site: What the site wants to know.
        shape: Nodes and tasks of each.
        submission: Where code and results are.
        works: What to do.
        name: Name of the jobs in the queue.
        after: Numbers of the jobs that have to end well before these start.

    Raises:
        UserError: Slurm refuses; its message.
    """
    executor = _Executor(submission.results, python=site.interpreter)
    shared = not works[0].recorded
    executor.update_parameters(**_parameters(site, shape, shared), job_name=name)
    executor.update_parameters(setup=[*site.setup, *_environment(site, submission.code)])
    if after:
        # Without the second, jobs whose condition cannot come true any more stay for ever.
        extra = executor.parameters["additional_parameters"]
        waits = {"dependency": "afterok:" + ":".join(after), "kill-on-invalid-dep": "yes"}
        executor.update_parameters(additional_parameters={**extra, **waits})
    try:
        jobs = executor.map_array(perform, works)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if "sbatch: error" in line]
        raise UserError(
            "\n  ".join(["sbatch refuses the job:", *(lines or [str(error)])])
        ) from error
    return [job.job_id for job in jobs]


def _parameters(site: SlurmConfig, shape: Shape, shared: bool) -> dict[str, Any]:
    """Return sbatch's options in submitit's names."""
    gpus: Any = shape.gpus_per_node or None
    if gpus and site.gpu_type:
        gpus = f"{site.gpu_type}:{gpus}"
    wanted = {
        "partition": (site.shared_partition if shared else None) or site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "gpus_per_node": gpus,
        "cpus_per_task": site.cpus_per_process,
        "mem": None if site.mem_gb is None else f"{int(site.mem_gb * 1024)}M",
        "time": (site.shared_time_min if shared else None) or site.time_min,
        "signal_delay_s": site.signal_delay_s,
        "array_parallelism": site.concurrent_jobs,
        "stderr_to_stdout": True,
        # One dead task ends the others, which would wait for it until their time limit.
        "srun_args": ["--kill-on-bad-exit=1", *site.srun],
        "additional_parameters": {"requeue": True, **site.sbatch},
    }
    # submitit's own default names a key that not every site knows.
    return {key: value for key, value in wanted.items() if value is not None} | {"wckey": None}


def _environment(site: SlurmConfig, code: Path) -> list[str]:
    """Return the shell lines that let the jobs run the copied code, from whatever folder."""
    lines = [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
    ]
    if site.offline:
        lines.append("export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1")
    return lines
