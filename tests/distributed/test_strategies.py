"""Several processes of each strategy compute what one process does, and go on where they stopped.

All of a file's runs share one start of the processes, for that takes longer than the runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import SftConfig
from rlhf_exp.data.batching import pack_demonstrations
from rlhf_exp.data.tokenized import tokenize_demonstrations
from rlhf_exp.distributed.world import world_of
from rlhf_exp.errors import UserError
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import load_causal_lm
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.training.sft import SftTask
from tests.distributed.lab import Job, rows, run_job, run_jobs
from tests.lab import small_config

CHOSEN = ("ddp", "zero2", "fsdp")
STAGES = ("sft", "reward", "ppo")
# Odd numbers: shares are filled up, and minibatches have more rows of one process than another's.
OVERRIDES = (
    "ppo.rollouts=7",
    "ppo.steps=4",
    "ppo.train_blocks=1",
    "ppo.micro_batch=1",
    "ppo.select=last",
    "reward.batch=7",
    "reward.select=last",
    "reward.steps=4",
    "sft.select=last",
    "sft.steps=4",
    "sft.micro_batch=3",
    "sft.gradient_checkpointing=true",
)


def job(folder: Path, name: str, stage: str, *overrides: str, stop_at: int | None = None) -> Job:
    """Return a job that starts from the models which one process made."""
    models = {role: str(folder / f"single-{role}" / "model") for role in STAGES}
    return Job(name, stage, [*OVERRIDES, *overrides], models, stop_at)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two: `STRATEGY-STAGE`, and `STRATEGY-STAGE-cut` interrupted."""
    folder = tmp_path_factory.mktemp("strategies")
    torch.set_num_threads(1)
    for stage in (*STAGES, "eval"):
        run_job(folder, job(folder, f"single-{stage}", stage))
    jobs = []
    for strategy in CHOSEN:
        choice = f"distributed={strategy}"
        jobs += [job(folder, f"{strategy}-{stage}", stage, choice) for stage in STAGES]
        for stop_at in (1, None):
            jobs.append(job(folder, f"{strategy}-ppo-cut", "ppo", choice, stop_at=stop_at))
        jobs.append(job(folder, f"{strategy}-sft-moved", "sft", choice, stop_at=2))
    for stage in ("ppo", "eval"):
        placed = ("distributed=ddp", "ppo.reward.placement=cpu")
        jobs.append(job(folder, f"ddp-{stage}-placed", stage, *placed))
    jobs.append(job(folder, "ddp-eval", "eval", "distributed=ddp"))
    run_jobs(folder, jobs, processes=2)
    return folder


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / name / "model" / "model.safetensors")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", CHOSEN)
def test_two_processes_equal_one(folder: Path, strategy: str, stage: str) -> None:
    one, two = rows(folder, f"single-{stage}"), rows(folder, f"{strategy}-{stage}")
    assert [row["global_step"] for row in one] == [row["global_step"] for row in two]
    compared = 0
    for ours, theirs in zip(one, two, strict=True):
        for name in ours.keys() & theirs.keys():
            if name.startswith(("loss", "eval", "reward", "kl", "optim", "policy", "value")):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=3e-5), name
                compared += 1
    assert compared > 15
    trained = weights(folder, f"{strategy}-{stage}")
    for name, value in weights(folder, f"single-{stage}").items():
        # A key's bias moves all of a query's scores alike, so its gradient is rounding alone, which
        # Adam blows up to full steps.
        if not name.endswith("query_key_value.bias"):
            assert torch.allclose(value, trained[name], atol=5e-5), name


def test_one_process_may_score_for_all(folder: Path) -> None:
    """Only its batches differ from those of two that score their shares: rounding."""
    shared, placed = rows(folder, "ddp-ppo"), rows(folder, "ddp-ppo-placed")
    assert [row["global_step"] for row in shared] == [row["global_step"] for row in placed]
    for ours, theirs in zip(shared, placed, strict=True):
        for name in ours.keys() & theirs.keys():
            if name.startswith(("loss", "eval", "reward", "kl", "optim", "policy", "value")):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5), name
    lines = [
        (folder / name / "samples.jsonl").read_text().splitlines()
        for name in ("ddp-eval", "ddp-eval-placed")
    ]
    answers = [[json.loads(line) for line in one] for one in lines]
    assert len({answer["score"] for answer in answers[0]}) > 8
    for ours, theirs in zip(*answers, strict=True):
        assert theirs["text"] == ours["text"]
        assert theirs["score"] == pytest.approx(ours["score"], abs=1e-5)


@pytest.mark.parametrize("strategy", CHOSEN)
def test_interrupted_and_resumed_equals_never_interrupted(folder: Path, strategy: str) -> None:
    """One process alone sees Ctrl-C; both stop, and end with the same weights, bit for bit."""
    whole, cut = (weights(folder, f"{strategy}-ppo{suffix}") for suffix in ("", "-cut"))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name
    head = "model/value_head.safetensors"
    heads = [load_file(folder / f"{strategy}-ppo{suffix}" / head) for suffix in ("", "-cut")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    steps = [row["global_step"] for row in rows(folder, f"{strategy}-ppo-cut")]
    assert steps == [row["global_step"] for row in rows(folder, f"{strategy}-ppo")]


@pytest.mark.parametrize("strategy", CHOSEN)
def test_the_published_model_is_the_trained_one(folder: Path, strategy: str) -> None:
    """The library loads the folder, and the validation loss is the last one that was logged."""
    config = small_config(folder, *OVERRIDES)
    logged = [row["eval/loss"] for row in rows(folder, f"{strategy}-sft") if "eval/loss" in row]
    found = validation_loss(folder / f"{strategy}-sft" / "model", config)
    assert found == pytest.approx(logged[-1], rel=1e-5)
    newest = sorted((folder / f"{strategy}-ppo" / "checkpoints").glob("step-*"))[-1]
    published = weights(folder, f"{strategy}-ppo")
    for name, value in load_file(newest / "trainable.safetensors").items():
        if name.startswith("model."):
            assert torch.equal(value, published[name.removeprefix("model.")]), name


def validation_loss(model: Path, config: Config) -> float:
    """Return one process's validation loss of a plain model folder."""
    materials = DataModule(config.data)
    codec = materials.codec(model)
    length, rows = config.sft.seq_length, materials.corpus.demonstrations.validation
    tokenized = tokenize_demonstrations(rows, codec, length)
    packed = pack_demonstrations(tokenized, length, config.sft.packing, config.sft.loss_on.value)
    policy = Policy(load_causal_lm(model), value_head=False)
    with world_of("float32", threads=1) as world:
        task = SftTask(policy, packed, packed, SftConfig(batch=8, seed=0), world)
        return -task.evaluate().objective


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_another_number_of_processes_goes_on(folder: Path, strategy: str) -> None:
    """Two processes stopped at step 2; one finishes."""
    name = f"{strategy}-sft-moved"
    assert json.loads((folder / name / "returned.json").read_text()) == {"interrupted": 1.0}
    run_job(folder, job(folder, name, "sft"))
    steps = [row["global_step"] for row in rows(folder, name) if "loss/total" in row]
    assert steps == [1, 2, 3, 4]
    ours, theirs = weights(folder, name), weights(folder, "single-sft")
    for key, value in ours.items():
        if not key.endswith("query_key_value.bias"):
            assert torch.allclose(value, theirs[key], atol=5e-5), key


def test_zero_refuses_another_number_of_processes(folder: Path) -> None:
    with pytest.raises(UserError, match="distributed=zero2 by 2 processes, and this run has 1"):
        run_job(folder, job(folder, "zero2-sft-moved", "sft"))


def test_evaluation_shares_the_prompts_out(folder: Path) -> None:
    one, two = (
        json.loads((folder / f"{name}-eval" / "result.json").read_text())
        for name in ("single", "ddp")
    )
    assert one.keys() == two.keys()
    assert len(one["rows"]) == len(two["rows"]) == 8
    for ours, theirs in zip(one["rows"], two["rows"], strict=True):
        for key in ("prompt", "answer_a", "answer_b"):
            assert ours[key] == theirs[key]
        assert theirs["score_b"] == pytest.approx(ours["score_b"], abs=1e-5)


def test_every_process_has_its_part_in_a_checkpoint(folder: Path) -> None:
    for strategy in CHOSEN:
        newest = sorted((folder / f"{strategy}-ppo" / "checkpoints").glob("step-*"))[-1]
        names = {path.name for path in newest.iterdir()}
        assert {"process-0.pt", "process-1.pt"} <= names
        state = json.loads((newest / "state.json").read_text())
        assert state["processes"] == 2
