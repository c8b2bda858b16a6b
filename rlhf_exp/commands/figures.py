"""`rlhf-exp figures`: the charts of a run as SVG files, for papers and documentation."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.report.figures import write_sheets
from rlhf_exp.report.gather import gather


def write_figures(outputs: Path, run: str, folder: Path) -> list[Path]:
    """Write the charts of `run` into `folder`, one file a stage, and return their paths."""
    found = Outputs(outputs)
    data = gather(found.run(run).name, found.artifacts(run))
    return write_sheets(data.metrics, folder, data.calibration, data.kl_target)
