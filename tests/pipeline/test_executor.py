"""Whole runs of several processes: started here, joined, interrupted, killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf_exp.pipeline.plan import records_of
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.store import Store
from tests.lab import LAUNCH, artifact, launch, small, small_config, weights
from tests.pipeline.chaos import Monkey, environment, leftovers, rows, survivors

DDP = ("distributed=ddp", "distributed.processes=2")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of several that torchrun has started."""

    def become(rank: int, processes: int) -> None:
        values = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "MASTER_PORT": 1}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    return become


def test_the_number_of_processes_is_checked(
    joined: Callable[[int, int], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    joined(0, 3)
    assert launch(tmp_path, *DDP) == 2
    message = capfd.readouterr().err
    assert "distributed.processes=2, but torchrun" in message
    assert "has started 3; start 2, or set distributed.processes=3" in message
    joined(1, 3)
    with pytest.raises(SystemExit) as caught:
        launch(tmp_path, *DDP)
    assert caught.value.code == 2
    assert capfd.readouterr().err == "", "rank 0 says it"
    assert not (tmp_path / "store").exists()


def test_a_plan_starts_nothing_and_is_printed_once(
    joined: Callable[[int, int], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    joined(0, 3)
    assert launch(tmp_path, "plan=true", *DDP) == 0
    told = capfd.readouterr()
    assert "sft" in told.out
    assert told.err == ""
    joined(1, 3)
    assert launch(tmp_path, "plan=true", *DDP) == 0
    assert tuple(capfd.readouterr()) == ("", "")
    assert not (tmp_path / "store").exists()


def test_one_process_of_torchrun_works_alone(
    joined: Callable[[int, int], None], tmp_path: Path
) -> None:
    joined(0, 1)
    assert launch(tmp_path, "stage=sft") == 0
    assert "RANK" not in os.environ
    artifact(tmp_path, "sft").verify()


def test_a_multirun_of_different_strategies(tmp_path: Path) -> None:
    assert launch(tmp_path / "one", "stage=sft", "distributed=single") == 0
    # The three have one key, and our own launcher would run them once.
    sweep = ["-m", "hydra/launcher=basic", "name=mixed", "stage=sft", "rerun=[sft]"]
    sweep += ["distributed=single,ddp,single"]
    before = set(psutil.Process().children(recursive=True))
    assert launch(tmp_path / "many", *sweep) == 0
    records = records_of(small_config(tmp_path / "many")).sweep("mixed")
    assert [one.status for one in records] == ["done"]
    assert weights(artifact(tmp_path / "many", "sft")) == weights(artifact(tmp_path / "one", "sft"))
    rest = set(psutil.Process().children(recursive=True)) - before
    assert not [one for one in rest if "resource_tracker" not in " ".join(one.cmdline())]
    assert leftovers(tmp_path / "many") == []


REDO = ("rerun=[ppo]", "eval=none", *DDP)


def command_of(outputs: Path, *overrides: str) -> list[str]:
    """Return the arguments of `launch.py` for a run that redoes PPO in two processes."""
    return [str(LAUNCH), *small(outputs, *REDO, *overrides)]


@pytest.fixture(scope="module")
def redone(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the small run's PPO, redone by two processes that nobody disturbs."""
    outputs = shutil.copytree(small_run, tmp_path_factory.mktemp("redone") / "outputs")
    before = artifact(outputs, "ppo")
    assert launch(outputs, *REDO) == 0
    after = artifact(outputs, "ppo")
    assert after.manifest.created > before.manifest.created
    assert leftovers(outputs) == []
    return weights(after)


def interrupted(outputs: Path, times: int, *overrides: str) -> tuple[int, str]:
    """Redo PPO and press Ctrl-C in its first iteration; return the exit code and what was said."""
    # A session of its own has a foreground group of its own: all of it gets the signal.
    run = subprocess.Popen(
        [sys.executable, *command_of(outputs, "ppo.checkpoint_every=1000", *overrides)],
        cwd=outputs.parent,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while run.poll() is None and rows(outputs, "ppo") < 1:
        time.sleep(0.01)
    for _ in range(times):
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.1)
    _, said = run.communicate(timeout=200)
    assert not survivors(outputs.parent)
    return run.returncode, said


def test_ctrl_c_in_two_processes(run_copy: Path, redone: str) -> None:
    code, said = interrupted(run_copy, times=1)
    assert code == 130, said
    assert said.count("saving at the end of this iteration") == 1
    assert said.count("the same command goes on") == 1
    assert "Traceback" not in said
    # Checkpoints only on demand: what is saved is what Ctrl-C saves.
    saved = list((run_copy / "store" / ".staging").glob("ppo-*/checkpoints/step-*"))
    assert len(saved) == 1
    assert launch(run_copy, *REDO) == 0
    assert weights(artifact(run_copy, "ppo")) == redone


@pytest.mark.slow
def test_a_second_ctrl_c_in_two_processes(run_copy: Path) -> None:
    long = ("ppo.rollouts=2048", "ppo.batch=2048", "ppo.eval_every=1000", "ppo.steps=30")
    code, said = interrupted(run_copy, 2, *long)
    assert code == 130, said
    assert said.count("saving at the end of this iteration") == 1
    assert "Traceback" not in said
    assert not list((run_copy / "store" / ".staging").glob("ppo-*/checkpoints/step-*"))


def torchrun(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_on_one_machine(run_copy: Path, redone: str) -> None:
    run = torchrun("--nproc-per-node=2", *command_of(run_copy), folder=run_copy.parent)
    said, _ = run.communicate(timeout=280)
    assert run.returncode == 0, said
    assert weights(artifact(run_copy, "ppo")) == redone
    assert said.count("ppo 6/6") == 1, "one process speaks"
    assert leftovers(run_copy) == []


@pytest.mark.slow
def test_torchrun_on_two_machines(run_copy: Path, redone: str) -> None:
    """Two agents, each with a group of its own, as on two machines that share a file system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test")
    where = f"--rdzv-endpoint=127.0.0.1:{port}"
    line = command_of(run_copy)
    runs = [torchrun(*meeting, where, *line, folder=run_copy.parent) for _ in range(2)]
    said = [run.communicate(timeout=280)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert weights(artifact(run_copy, "ppo")) == redone
    assert sorted("ppo 6/6" in text for text in said) == [False, True], "one process speaks"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["leader's", "other"])
def test_the_end_of_one_machine_ends_the_other(where: str, run_copy: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test")
    address = f"--rdzv-endpoint=127.0.0.1:{port}"
    line = command_of(run_copy, "ppo.steps=1000")
    runs = [torchrun(*meeting, address, *line, folder=run_copy.parent) for _ in range(2)]
    while rows(run_copy, "ppo") < 2:
        time.sleep(0.05)
        assert all(run.poll() is None for run in runs)
    victims = [one for run in runs for one in psutil.Process(run.pid).children()]
    leaders = [one for one in victims if one.environ()["RANK"] == "0"]
    (victim,) = leaders if where == "leader's" else set(victims) - set(leaders)
    victim.kill()
    for run in runs:
        run.communicate(timeout=120)
    assert all(run.returncode == 1 for run in runs)
    assert not survivors(run_copy.parent)


def artifacts(outputs: Path) -> dict[str, str]:
    """Return the weights of all models in a store, by stage and key, after a look at each file."""
    found: list[Artifact] = []
    for stage in ("sft", "reward", "ppo"):
        found += Store(outputs / "store").find(f"{stage}/")
    for one in found:
        one.verify()
    return {f"{one.stage}/{one.key}": weights(one) for one in found}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_of_random_processes(run_copy: Path, tmp_path: Path) -> None:
    """Workers and the process that leads them are killed at random moments, and in checkpoints."""
    kills, seed = int(os.environ.get("RLHF_EXP_KILLS", "5")), random.randrange(10**6)
    # A run without kills in between must not come to its end before they are done.
    longer = (f"ppo.steps={20 * kills}", "ppo.checkpoint_every=2")
    whole = shutil.copytree(run_copy, tmp_path / "whole")
    assert launch(whole, *REDO, *longer) == 0
    others = artifacts(run_copy)
    command = [sys.executable, *command_of(run_copy, *longer)]
    monkey = Monkey(command, run_copy.parent, run_copy, seed)
    monkey.run(kills)
    print(f"seed {seed}: {Counter(monkey.victims)}, exit codes {Counter(monkey.exits)}")
    assert len(monkey.victims) >= min(kills, 3), monkey
    assert leftovers(run_copy) == []
    assert artifacts(run_copy) == {**others, **artifacts(whole)}, monkey
