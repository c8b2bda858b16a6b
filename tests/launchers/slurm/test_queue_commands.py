from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.launchers.slurm.monitor import JobState, Unreachable, job_states, last_state


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that stand in for Slurm's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_states_are_read_from_squeue(commands: Path) -> None:
    put(
        commands,
        "squeue",
        'echo "12_0   RUNNING  1  None"\n'
        'echo "12_1   PENDING  0  Nodes required for job are DOWN"\n'
        'echo "12_2   COMPLETED  0  None"',
    )
    found = job_states(["12_0", "12_1"])
    assert found == {
        "12_0": JobState("RUNNING", 1, "None"),
        "12_1": JobState("PENDING", 0, "Nodes required for job are DOWN"),
    }
    assert [one.ended for one in found.values()] == [False, False]
    assert job_states(["12_2"])["12_2"].ended
    assert job_states([]) == {}


def test_jobs_that_squeue_has_forgotten(commands: Path) -> None:
    put(commands, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert job_states(["12"]) == {}


def test_a_controller_that_does_not_answer(commands: Path) -> None:
    put(commands, "squeue", 'echo "slurm_load_jobs error: Unable to contact" >&2; exit 1')
    with pytest.raises(Unreachable, match="Unable to contact"):
        job_states(["12"])


def test_accounting_is_asked_only_where_it_is(commands: Path) -> None:
    put(commands, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    assert last_state("12") is None
    put(commands, "sacct", "echo 'CANCELLED by 1000'")
    assert last_state("12") == "CANCELLED"
