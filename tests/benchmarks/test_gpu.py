"""The program for GPUs, on what there is: its sections, its tables, and its list of wheels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest

from rlhf_exp.models.memory_estimate import MemoryEstimate, estimate_memory
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import SharedTrunkReference

ROOT = Path(__file__).resolve().parents[2]


def test_a_section_that_fails_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: gpu.Run) -> None:
        """Fail."""
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu.SECTIONS, "broken", broken)
    run = gpu.Run(tmp_path, 60.0, tiny=True)
    gpu.run_sections(run, ["broken", "versions"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "out of luck" in found["broken"]["failed"]
    assert found["versions"]["torch"]
    assert found["seconds"].keys() == {"broken", "versions"}


def test_without_time_a_section_is_left_out(tmp_path: Path) -> None:
    run = gpu.Run(tmp_path, 0.0, tiny=True)
    run.tiny = False
    gpu.run_sections(run, ["versions"])
    assert run.found["versions"] == {"left out": "no time"}


def test_tables_have_a_row_for_each_kind() -> None:
    text = gpu.markdown(
        {"decoding": {"A": {"ms": 1, "end": "x"}, "B": {"ms": 2, "GiB": 3}}, "limits": {"TB/s": 4}}
    )
    assert (
        text.splitlines()
        == [
            *(
                "### decoding",
                "",
                "| | ms | GiB |",
                "|---|---:|---:|",
                "| A | 1 |  |",
                "| B | 2 | 3 |",
            ),
            *("", "### limits", "", "| | |", "|---|---|", "| TB/s | 4 |", ""),
        ][:-1]
    )


def test_wheels_are_pinned_and_without_torch() -> None:
    lines = gpu.wheels()
    names = [line.partition("==")[0] for line in lines]
    assert {"hydra-core", "omegaconf", "transformers", "tokenizers", "pytest"} <= set(names)
    assert not {"torch", "rlhf-exp", "triton"} & set(names)
    assert names == sorted(names)


def test_the_plan_of_an_update_counts_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is a copy of what trains, in float32 as that is."""
    references, plans = list[SharedTrunkReference](), list[MemoryEstimate]()

    def build(policy: Policy) -> SharedTrunkReference:
        references.append(SharedTrunkReference(policy))
        return references[-1]

    def estimate(*args: Any, **settings: Any) -> MemoryEstimate:
        plans.append(estimate_memory(*args, **settings))
        return plans[-1]

    monkeypatch.setattr(gpu, "build_reference", build)
    monkeypatch.setattr(gpu, "estimate_memory", estimate)
    run = gpu.Run(tmp_path, 60.0, tiny=True)
    gpu.update(run, run.shape(gpu.GPTJ_6B), 1)
    parameters = [p for copy in references[0].copies for p in copy.parameters()]
    held = sum(p.numel() * p.element_size() for p in parameters)
    assert plans[0].reference == pytest.approx(held, rel=0.02)  # less the head's bias


@pytest.mark.slow
def test_everything_in_small(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--tiny",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "gpu.md").read_text() in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "failed" not in json.dumps(found)
    assert found["seconds"].keys() == set(gpu.SECTIONS)
    assert found["agreement"]["llama"]["equal tokens"] == 1.0
    assert {one["code"] for one in found["smoke"].values()} == {0}
