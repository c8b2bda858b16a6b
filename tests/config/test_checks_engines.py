"""Other engines: their interpreters, and what their libraries cannot do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlhf_exp.config.checks_engines import INTERPRETERS, TRLX_FAMILIES
from rlhf_exp.config.experiment import EngineName
from rlhf_exp.trlx import convert
from tests.config.test_checks import complaints

ROOT = Path(__file__).parents[2]
TRLX = INTERPRETERS[EngineName.trlx]


def interpreter(folder: Path, **versions: str | None) -> str:
    """Return an interpreter that says it has these."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{json.dumps(versions)}'\n")
    path.chmod(0o755)
    return f"engine.python={path}"


@pytest.fixture
def working(tmp_path: Path) -> str:
    return interpreter(tmp_path, trlx="0.7.0", transformers="4.32.0")


def test_the_interpreter_is_looked_at(tmp_path: Path, working: str) -> None:
    assert complaints("engine=trlx", working) == []
    for option in ("ahead=1", "correction=3"):
        messages = complaints("engine=trlx", working, f"ppo.generation.{option}")
        assert any("has no effect on engine=trlx" in message for message in messages)
    (messages,) = complaints("engine=trlx")
    assert messages.startswith("engine.python=null: engine=trlx needs an interpreter that has trlx")
    assert f"`{TRLX.setup}`" in messages
    (messages,) = complaints("engine=trlx", f"engine.python={tmp_path}/nowhere")
    assert f"there is no interpreter {tmp_path}/nowhere; `bash " in messages
    (messages,) = complaints("engine=trlx", f"engine.python={sys.executable}")
    assert "has no trlx; `bash " in messages
    (messages,) = complaints("engine=trlx", interpreter(tmp_path, trlx="1", transformers="4.46.3"))
    assert (
        "has transformers 4.46.3, with which trlx's reference is wrong; it needs 4.32.0" in messages
    )
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (messages,) = complaints("engine=trlx", f"engine.python={tmp_path}/python")
    assert "is no Python that runs" in messages


def test_the_interpreter_is_asked_once(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    python = interpreter(tmp_path, trlx="0.7.0", transformers="4.32.0")
    path = tmp_path / "python"
    path.write_text(path.read_text() + f"echo >> {asked}\n")
    for rate in ("1e-5", "2e-5", "3e-5"):
        assert complaints("engine=trlx", python, f"ppo.lr={rate}") == []
    assert asked.read_text().count("\n") == 1


def test_the_interpreter_is_looked_at_where_ppo_runs_only(tmp_path: Path) -> None:
    assert complaints("engine=trlx", "plan=true") == []
    assert complaints("engine=trlx", "stage=reward", "distributed=ddp") == []
    assert complaints("engine=trlx", "ppo.use=other", "distributed=ddp") == []


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("distributed=ddp", "distributed.strategy=ddp: PPO by trlx runs in one process"),
        ("distributed.precision=bfloat16", "distributed.precision=bfloat16: PPO by trlx computes"),
        ("model.dtype=bfloat16", "model.dtype=bfloat16: PPO by trlx computes in float32 only"),
        ("probe=true", "probe=true: a probe measures engine=native only"),
        ("model.architecture.type=qwen2", "model.architecture.type=qwen2: trlx trains gpt2, gptj"),
        ("ppo.lora.rank=4", "ppo.lora.rank=4: not with trlx; use ppo.train_blocks"),
        ("ppo.warmup_steps=5", "ppo.warmup_steps=5: a warm-up: trlx has none"),
        ("ppo.gradient_checkpointing=true", "ppo.gradient_checkpointing=true: trlx has none"),
        ("ppo.keep=[last]", "ppo.keep=[last]: snapshots: trlx has none"),
        ("ppo.keep_every=10", "ppo.keep_every=10: snapshots: trlx has none"),
        ("ppo.keep_state=true", "ppo.keep_state=true: checkpoints: trlx has none"),
        ("ppo.continue_from=first", "ppo.continue_from=first: checkpoints: trlx has none"),
        ("ppo.micro_batch=8", "ppo.micro_batch=8: trlx adds up the gradients of micro-batches"),
        ("ppo.rollouts=1 ppo.batch=1", "ppo.rollouts=1: trlx divides by the standard deviation"),
        ("ppo.generation.batch=1", "ppo.generation.batch=1: trlx divides by the standard"),
        ("ppo.value_init=reward", "ppo.value_init=reward: trlx's value head is small"),
        ("ppo.value_trunk=own", "ppo.value_trunk=own: trlx's value head is small and reads"),
        ("ppo.entropy_coef=0.1", "ppo.entropy_coef=0.1: trlx has no entropy bonus"),
        ("ppo.kl.stop=20", "ppo.kl.stop=20.0: trlx does not stop by KL"),
        ("ppo.generation.temperature=0.7", "temperature=0.7: trlx takes log-probabilities at"),
    ],
)
def test_what_trlx_cannot_do_is_refused(working: str, overrides: str, complaint: str) -> None:
    (messages,) = complaints("engine=trlx", working, *overrides.split())
    assert complaint in messages


def test_a_micro_batch_of_the_whole_batch_is_none(working: str) -> None:
    assert complaints("engine=trlx", working, "ppo.micro_batch=32", "ppo.batch=32") == []


def test_a_local_model_is_known_by_its_own_family(tmp_path: Path, working: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    messages = complaints("engine=trlx", working, f"model.path={model}")
    assert any(line.startswith(f"model.path={model}: trlx trains gpt2, gptj") for line in messages)


@pytest.mark.parametrize("engine", INTERPRETERS)
def test_what_is_written_in_several_places_agrees(engine: EngineName) -> None:
    needed = INTERPRETERS[engine]
    _, script, folder = needed.setup.split()
    pinned = (ROOT / script).with_name("requirements.txt").read_text().splitlines()
    for name, (version, _) in needed.needs.items():
        assert any(line.startswith(f"{name}=={version}") for line in pinned)
    assert all("==" in line for line in pinned if not line.startswith("#"))
    assert f"{script} {folder}" in (ROOT / needed.page).read_text()
    assert f"/{folder}/" in (ROOT / ".gitignore").read_text().splitlines()
    assert tuple(convert._CLASSES) == TRLX_FAMILIES


RLOO = ("ppo=rloo", "ppo.kl.target=null")
GRPO = ("ppo=grpo", "ppo.kl.target=null")


@pytest.fixture
def trl(tmp_path: Path) -> str:
    return interpreter(tmp_path, trl="1.16.0")


def test_trl_has_an_interpreter_of_its_own(tmp_path: Path, trl: str) -> None:
    assert complaints("engine=trl", trl, *RLOO) == []
    assert complaints("engine=trl", trl, "stage=dpo") == []
    (messages,) = complaints("engine=trl", *GRPO)
    assert "engine=trl needs an interpreter that has TRL; `bash rlhf_exp/trl/setup.sh" in messages
    (messages,) = complaints("engine=trl", interpreter(tmp_path, trl="1.10.0"), "stage=dpo")
    assert "has trl 1.10.0, whose trainers are others; it needs 1.16; `bash" in messages


def test_trl_is_looked_at_where_it_trains_only(trl: str) -> None:
    evaluated = ("stage=eval", "eval.models=[sft,dpo]")
    assert complaints("engine=trl", trl, *evaluated) == [], "PPO's algorithm does not matter"
    assert complaints("engine=trl", "stage=reward", "distributed=ddp") == []
    assert complaints("engine=trl", "stage=dpo", "dpo.use=other") == []


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("ppo.kl.target=null", "ppo.advantage=gae: TRL has RLOO and GRPO; use ppo=rloo or"),
        ("ppo=reinforce_pp", "ppo.advantage=reinforce_pp: TRL has RLOO and GRPO"),
        (
            "ppo=rloo ppo.kl.target=6",
            "ppo.kl.target=6.0: TRL's penalty has a fixed weight; use null",
        ),
        ("ppo=rloo ppo.kl.target=null ppo.kl.where=loss", "TRL's RLOO has the penalty k1 in the"),
        ("ppo=grpo ppo.kl.target=null ppo.kl.estimator=k2", "TRL's GRPO has the penalty k3 in the"),
        ("ppo=rloo ppo.kl.target=null ppo.loss_mean=sequences", "the ratio of whole responses"),
        ("ppo=rloo ppo.kl.target=null ppo.batch=48", "use a divisor of ppo.rollouts=128"),
        ("ppo=rloo ppo.kl.target=null ppo.micro_batch=5", "use a divisor of ppo.batch=32"),
        ("ppo=rloo ppo.kl.target=null ppo.lora.rank=4", "ppo.lora.rank=4: not with engine=trl"),
        ("ppo=rloo ppo.kl.target=null ppo.keep=[last]", "ppo.keep=[last]: snapshots: engine=trl"),
        ("ppo=rloo ppo.kl.target=null ppo.keep_state=true", "checkpoints: engine=trl has none"),
        ("ppo=rloo ppo.kl.target=null ppo.entropy_coef=0.1", "ppo.entropy_coef=0.1: not with"),
        (
            "ppo=rloo ppo.kl.target=null model.architecture.type=gpt2",
            "model.architecture.type=gpt2: TRL pads prompts on the left without telling positions",
        ),
        ("ppo=rloo ppo.kl.target=null ppo.kl.stop=20", "ppo.kl.stop=20.0: TRL does not stop by KL"),
        (
            "ppo=grpo ppo.kl.target=null ppo.loss_mean=tokens ppo.micro_batch=8",
            "ppo.micro_batch=8: TRL takes the mean over tokens in each micro-batch",
        ),
        ("stage=dpo distributed=ddp", "distributed.strategy=ddp: DPO by TRL runs in one process"),
        ("stage=dpo dpo.packing=true", "dpo.packing=true: not with engine=trl"),
        ("stage=dpo dpo.label_smoothing=0.1", "TRL 1.16 smooths no labels of this loss; use 0"),
        ("stage=dpo dpo.loss=ipo", "dpo.length_normalised=false: TRL's IPO takes means over"),
        (
            "stage=dpo dpo.loss=hinge dpo.length_normalised=true",
            "dpo.length_normalised=true: TRL's hinge loss takes sums over tokens",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused(trl: str, overrides: str, complaint: str) -> None:
    (messages,) = complaints("engine=trl", trl, *overrides.split())
    assert complaint in messages
