"""`rlhf-exp report`: the report of a run, written again from the store."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.report.gather import gather
from rlhf_exp.report.page import build_report


def write_report(outputs: Path, run: str) -> Path:
    """Write the report of `run` and return its path."""
    found = Outputs(outputs)
    artifacts = found.artifacts(run)
    final = list(artifacts.values())[-1]
    path = outputs / "reports" / f"{final.stage}-{final.key}.html"
    build_report(gather(found.run(run).name, artifacts), path)
    return path.resolve()
