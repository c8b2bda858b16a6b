"""The notebook `examples/tour.ipynb`, executed at small sizes."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import rlhf_exp
from tests.lab import SMALL

pytest.importorskip("IPython", reason="`make venv` brings it, by ipykernel")
NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def cells(outputs: Path) -> list[dict[str, Any]]:
    """Return the notebook's cells, with small sizes and another folder in its parameters."""
    read: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (parameters,) = (cell for cell in read if "parameters" in cell["metadata"].get("tags", ()))
    small = f"\nexperiment = {list(SMALL)}\noutputs = {str(outputs)!r}\n"
    parameters["source"] = [*parameters["source"], small]
    return read


def test_its_code_runs(run_copy: Path) -> None:
    """Cell by cell in one namespace; of the three runs two are in the store already."""
    names: dict[str, Any] = {}
    for cell in cells(run_copy):
        if cell["cell_type"] == "code":
            exec(compile(ast.parse("".join(cell["source"])), str(NOTEBOOK), "exec"), names)
    assert isinstance(names["sweep"], rlhf_exp.Sweep)
    assert names["table"]["ppo.lr"].tolist() == [0.0003, 0.001]
    assert (names["table"]["status"] == "done").all()
    assert set(names["figures"]) == {"sft", "reward", "ppo"}
    assert names["answers"].shape == (8, 4)  # text and score of both models, eval.prompts=8
    assert names["run"].report.is_file()


@pytest.mark.slow
def test_it_is_executed_as_a_notebook(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell, small in zip(notebook.cells, cells(tmp_path / "outputs"), strict=True):
        cell["source"] = "".join(small["source"])
    NotebookClient(notebook, timeout=280, kernel_name="python3").execute(cwd=str(tmp_path))
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in shown if output.output_type == "error"]
    pictures = [output for output in shown if "image/svg+xml" in output.get("data", {})]
    tables = [output for output in shown if "text/html" in output.get("data", {})]
    assert len(pictures) == 1
    assert len(tables) > 4


def test_what_is_stored_of_it_is_true() -> None:
    """Either all cells were executed, in order, or none was."""
    read = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    counts = [cell["execution_count"] for cell in read if cell["cell_type"] == "code"]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
