from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.config.checks_sweep import JobShape, job_shape, slurm_problems
from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import Config, StageName, StrategyName
from rlhf_exp.config.launchers import SlurmConfig
from rlhf_exp.config.problems import Problem
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.errors import UserError
from rlhf_exp.hydra_app import main


@pytest.fixture(autouse=True)
def _sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def config(processes: int, strategy: StrategyName = StrategyName.ddp) -> Config:
    composed = Config()
    composed.distributed.processes, composed.distributed.strategy = processes, strategy
    return composed


@pytest.mark.parametrize(
    ("processes", "gpus", "per_node", "expected"),
    [
        (1, 8, None, JobShape(1, 1, 1)),
        (7, 8, None, JobShape(1, 7, 7)),
        (16, 8, None, JobShape(2, 8, 8)),
        (12, 8, None, JobShape(2, 6, 6)),
        (8, 8, 4, JobShape(2, 4, 4)),
        (4, 0, None, JobShape(1, 4, 0)),
        (4, 0, 2, JobShape(2, 2, 0)),
    ],
)
def test_nodes_follow_from_processes(
    processes: int, gpus: int, per_node: int | None, expected: JobShape
) -> None:
    site = SlurmConfig(gpus_per_node=gpus, processes_per_node=per_node)
    assert job_shape(site, config(processes)) == expected


@pytest.mark.parametrize(
    ("processes", "placement", "gpus"),
    [(7, "gpu:7", 8), (14, "gpu:7", 8), (4, "gpu:5", 6), (4, "cpu", 4)],
)
def test_the_reward_models_own_gpu_is_asked_for(processes: int, placement: str, gpus: int) -> None:
    base = config(processes)
    base.ppo.reward.placement = placement
    shape = job_shape(SlurmConfig(gpus_per_node=8), base)
    assert shape == JobShape(-(-processes // 8), min(processes, 7), gpus)
    base.stage = StageName.sft
    shape = job_shape(SlurmConfig(gpus_per_node=8), base)
    assert isinstance(shape, JobShape)
    assert shape.gpus_per_node == shape.tasks_per_node


@pytest.mark.parametrize(("processes", "gpus"), [(8, 8), (7, 7), (4, 0)])
def test_a_node_without_a_gpu_for_the_reward_model(processes: int, gpus: int) -> None:
    base = config(processes)
    base.ppo.reward.placement = "gpu:7"
    shape = job_shape(SlurmConfig(gpus_per_node=gpus), base)
    assert isinstance(shape, Problem)
    assert str(shape).startswith("ppo.reward.placement=gpu:7: of a node's hydra.launcher.gpus_")


def test_processes_that_cannot_be_shared_out() -> None:
    # 9 on nodes of 8 need two nodes, which get 4 or 5 each.
    shape = job_shape(SlurmConfig(gpus_per_node=8), config(9))
    assert isinstance(shape, Problem)
    assert "use 8 or 10" in shape.message


def test_a_multirun_has_one_kind_of_job() -> None:
    site = SlurmConfig()
    assert slurm_problems(site, [config(2), config(2)]) == []
    for other in (config(4), config(2, StrategyName.zero2)):
        (problem,) = slurm_problems(site, [config(2), other])
        assert str(problem).startswith("distributed=: a multirun on Slurm has one kind of job")


def test_values_of_a_site_that_cannot_be() -> None:
    site = SlurmConfig(time_min=0, grace_s=200.0, processes_per_node=0)
    problems = [str(problem) for problem in slurm_problems(site, [config(1)])]
    assert problems == [
        "hydra.launcher.time_min=0: must be above 0.",
        "hydra.launcher.processes_per_node=0: must be above 0, or null.",
        "hydra.launcher.grace_s=200.0: must be below signal_delay_s=120.",
    ]


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (problem,) = slurm_problems(SlurmConfig(), [config(1)])
    assert "there is no sbatch here" in problem.message


def test_a_site_file_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "hydra" / "launcher" / "here.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# Ours.\ndefaults: [slurm]\npartition: fast\nsetup: [module load cuda]\n")
    site = compose(["hydra/launcher=here", "hydra.launcher.time_min=5"], [CONF, tmp_path]).site
    assert site is not None
    assert (site.partition, site.setup, site.time_min) == ("fast", ["module load cuda"], 5)
    assert site.concurrent_jobs == SlurmConfig().concurrent_jobs
    assert compose().site is None


def test_a_mistake_in_a_site_file() -> None:
    with pytest.raises(UserError, match=r"Key 'partitoin' (is )?not in 'SlurmConfig'"):
        compose(["hydra/launcher=slurm", "hydra.launcher.partitoin=x"])


def test_two_kinds_of_jobs_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    existing = set(tmp_path.iterdir())
    assert main(["-m", "hydra/launcher=slurm", "name=a", "distributed.processes=1,2"]) == 2
    assert "a multirun on Slurm has one kind of job" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == existing


def test_one_run_is_a_multirun_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hydra/launcher=slurm", "experiment=smoke", "name=null"]) == 2
    assert capsys.readouterr().err.startswith("error: name=null: a multirun needs a name")
