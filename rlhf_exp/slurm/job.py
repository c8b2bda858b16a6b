"""A task of a job: `python -m rlhf_exp.slurm.job FOLDER`, with submitit's folder.

Nothing is imported before notices are blocked: libraries start threads, which would not know of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_exp.distributed.exit import exit_after
from rlhf_exp.slurm.notice import block


def main(folder: str) -> int:
    """Run what submitit has stored for this job."""
    block()
    from submitit.core.submission import process_job

    from rlhf_exp.distributed.slurm_task import slurm_task
    from rlhf_exp.slurm.results import forget

    task = slurm_task()
    forget(Path(folder), task.job, task.rank)
    process_job(folder)
    return 0


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1]))
