"""`rlhf-exp cancel`: ends the Slurm jobs of a name."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.slurm import overview
from rlhf_exp.slurm.submission import submitted_names


def cancel(outputs: Path, name: str) -> str:
    """Cancel the jobs that were submitted under a name and have not ended; return what was done.

    Raises:
        UserError: Nothing has been submitted under that name, or Slurm refuses.
    """
    names = submitted_names(outputs)
    if name not in names:
        known = f"names with jobs: {', '.join(names)}" if names else "no jobs were submitted yet"
        raise UserError(f"cancel {name}: no Slurm jobs below {outputs}; {known}")
    ended = overview.cancel(outputs, name)
    if not ended:
        return f"{name}: no job is in the queue\n"
    lines = [f"  {view.job.id}  {view.progress}  {view.job.stage} {view.job.key}" for view in ended]
    more = "What they have done is kept: the same command of launch.py goes on.\n"
    return "\n".join([f"{name}: cancelled {len(ended)} jobs", *lines, more])
