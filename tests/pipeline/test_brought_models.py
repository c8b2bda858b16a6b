"""Which models are the user's own, what is asked of them, and how a comparison is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.config.experiment import Config
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.pipeline.brought_models import (
    BroughtModel,
    brought_models,
    model_problems,
    use_of,
)
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.pipeline.preflight import preflight_problems
from rlhf_exp.stages import model_check
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.stages.model_check import ModelUse, Problem, StageUse
from rlhf_exp.store.artifact import Artifact, Manifest
from tests.lab import launch, small_config
from tests.models.families import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


ALL = ("sft", "reward", "ppo", "eval")


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (("sft",), ("sft",)),
        (ALL, ALL),
        (("ppo", "eval"), ("ppo", "eval")),  # SFT and the reward model are in the store
        (("sft", "dpo"), ("sft", "dpo")),
        ((), None),
    ],
)
def test_a_base_model_and_all_that_becomes_of_it(
    work: tuple[str, ...], expected: tuple[str, ...] | None, tmp_path: Path
) -> None:
    config = small_config(tmp_path, "model.path=org/base", "model.revision=v2")
    found = brought_models(config, work, {"base": "org/base"})
    if expected is None:
        assert found == []
    else:
        assert found == [BroughtModel("model.path=org/base", "org/base", "v2", expected)]


def test_given_results_are_used_by_the_stages_after_theirs(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        "model.path=org/base",
        "sft.use=org/sft",
        "ppo.use=org/ppo",
        "reward.init=base",
        "eval.models=[sft,ppo,org/other]",
    )
    given = {"base": "org/base", "sft": "org/sft", "ppo": "org/ppo", "org/other": "org/other"}
    found = brought_models(config, ("reward", "eval"), given)
    assert [(model.option, model.stages) for model in found] == [
        ("model.path=org/base", ("reward",)),
        ("sft.use=org/sft", ("eval",)),
        ("ppo.use=org/ppo", ("eval",)),
        ("eval.models: org/other", ("eval",)),
    ]


def test_results_of_models_that_were_built_here_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr(
        model_check, "check_model", lambda path, revision, use: looked_at.append(path) or []
    )
    tiny_model("llama").save_pretrained(tmp_path / "model")
    config = small_config(tmp_path, f"sft.use={tmp_path / 'model'}", "stage=ppo")
    for base in (None, "theirs"):
        manifest = Manifest(stage="sft", key="0" * 16, config={"model": {"path": base}})
        given = Step(
            *("sft", "0" * 16, StepState.given),
            model=str(tmp_path / "model"),
            artifact=Artifact(tmp_path, manifest),
        )
        steps = [given, Step("ppo", "1" * 16, StepState.run)]
        preflight_problems(config, steps, lambda given: DataModule(config.data))
        assert len(looked_at) == (base is not None)


def test_what_is_asked_of_a_model(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        "sft.packing=true",
        "sft.seq_length=40",
        "reward.seq_length=56",
        "ppo.seq_length=72",
        "ppo.train_blocks=1",
        "reward.lora.rank=4",
        "reward.gradient_checkpointing=true",
        "dpo.seq_length=64",
        "dpo.train_blocks=1",
        "model.attention=eager",
    )
    sft = StageUse("sft", packing=True)
    assert use_of(config, ["sft"]) == ModelUse((sft,), None, "eager", 40)
    reward = StageUse("reward", lora=LoraSettings(4), checkpointing=True)
    ppo = StageUse("ppo", train_blocks=1)
    assert use_of(config, ["sft", "reward", "ppo"]) == ModelUse(
        (sft, reward, ppo), "slots", "eager", 72
    )
    # DPO samples too, for the KL of its answers.
    dpo = StageUse("dpo", train_blocks=1)
    assert use_of(config, ["sft", "dpo"]) == ModelUse((sft, dpo), "slots", "eager", 64)
    config.dpo.eval_prompts, config.dpo.packing = 0, True
    dpo = StageUse("dpo", train_blocks=1, packing=True)
    assert use_of(config, ["sft", "dpo"]) == ModelUse((sft, dpo), None, "eager", 64)


def test_a_comparison_is_made_once_and_again_when_its_file_is_damaged(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[ModelUse] = []

    def check(path: str, revision: str | None, use: ModelUse) -> list[Problem]:
        calls.append(use)
        return [Problem("sft.packing", "it mixes rows; set sft.packing=false")]

    monkeypatch.setattr(model_check, "check_model", check)
    config = small_config(tmp_path, f"model.path={folder}")

    def problems(config: Config) -> list[str]:
        return model_problems(config, ("sft",), {"base": str(folder)})

    expected = [f"model.path={folder}: it mixes rows; set sft.packing=false"]
    for _ in range(2):
        assert problems(config) == expected
    assert len(calls) == 1
    (kept,) = (tmp_path / "cache" / "model_checks").iterdir()
    text = kept.read_text()
    for damage in (text[:-9], text.replace("mixes", "mizes"), "[]", ""):
        kept.write_text(damage)
        assert problems(config) == expected
    assert len(calls) == 5
    problems(small_config(tmp_path, f"model.path={folder}", "sft.train_blocks=1"))
    assert len(calls) == 6


def test_a_run_with_a_model_that_is_not_right_ends_before_it_trains(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "lfm2"
    tiny_model("lfm2").save_pretrained(model)
    assert launch(tmp_path / "out", "stage=ppo", f"model.path={model}") == 2
    told = " ".join(capfd.readouterr().err.split())
    assert "a 'lfm2' model mixes the rows" in told
    assert "set model.cache=library" in told
    assert "running" not in told
    assert launch(tmp_path / "out", "stage=ppo", f"model.path={model}", "plan=true") == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "memory is estimated for gpt2, gptj" in told
