"""`engine=trlx`: its interpreter, and what it cannot do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlhf_exp.config import check_engine
from rlhf_exp.engines.trlx import convert
from tests.config.test_checks import complaints

ROOT = Path(__file__).parents[2]


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
    (found,) = complaints("engine=trlx")
    assert found.startswith("engine.python=null: engine=trlx needs an interpreter that has trlx")
    assert f"`{check_engine.SETUP}`" in found
    (found,) = complaints("engine=trlx", f"engine.python={tmp_path}/nowhere")
    assert f"there is no interpreter {tmp_path}/nowhere; `bash " in found
    (found,) = complaints("engine=trlx", f"engine.python={sys.executable}")
    assert "has no trlx; `bash " in found
    (found,) = complaints("engine=trlx", interpreter(tmp_path, trlx="1", transformers="4.46.3"))
    assert "has transformers 4.46.3, with which trlx's reference is wrong; it needs 4.32.0" in found
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (found,) = complaints("engine=trlx", f"engine.python={tmp_path}/python")
    assert "is no Python that runs" in found


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
    (found,) = complaints("engine=trlx", working, *overrides.split())
    assert complaint in found


def test_a_micro_batch_of_the_whole_batch_is_none(working: str) -> None:
    assert complaints("engine=trlx", working, "ppo.micro_batch=32", "ppo.batch=32") == []


def test_a_local_model_is_known_by_its_own_family(tmp_path: Path, working: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    found = complaints("engine=trlx", working, f"model.path={model}")
    assert any(line.startswith(f"model.path={model}: trlx trains gpt2, gptj") for line in found)


def test_what_is_written_in_several_places_agrees() -> None:
    folder = ROOT / "rlhf_exp" / "engines" / "trlx"
    pinned = (folder / "requirements.txt").read_text().splitlines()
    assert f"transformers=={check_engine.TRANSFORMERS}" in pinned
    assert all("==" in line for line in pinned if not line.startswith("#"))
    assert tuple(convert._CLASSES) == check_engine.FAMILIES
    _, script, _ = check_engine.SETUP.split()
    assert (ROOT / script).is_file()
