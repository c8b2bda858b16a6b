"""Plan, run and doctor warn before a pretrained model is trained at a rate for a new one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_exp.cli import main
from rlhf_exp.config.compose import compose
from rlhf_exp.data.tokenizer import train_tokenizer
from rlhf_exp.pipeline.learning_rates import learning_rate_warnings
from rlhf_exp.pipeline.plan import plan
from tests.lab import artifact, launch, small


def warned(*overrides: str) -> dict[str, str]:
    """Return the warning of each stage."""
    config = compose(["output_dir=/nonexistent/outputs", "plan=true", *overrides]).config
    found = list(learning_rate_warnings(config, plan(config)))
    return {warning.partition(".")[0]: warning for warning in found}


def test_the_defaults_for_a_model_of_the_hub() -> None:
    found = warned("model.path=org/large")
    assert list(found) == ["sft", "reward", "ppo"]
    assert found["sft"] == (
        "sft.lr=0.001 (the default, for small models made from scratch) trains every layer of a "
        "pretrained model (model.path=org/large) and is likely to destroy what it has learned. Add "
        "sft=recipe for the published hyperparameters, or sft.lr=1e-05 or less"
    )


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (("sft=recipe", "reward=recipe", "ppo=recipe"), []),
        (("sft=recipe", "ppo=recipe"), ["reward"]),
        (("sft=recipe", "reward=recipe", "ppo=recipe", "ppo.lr=2e-4"), ["ppo"]),
        (("sft.lr=1e-4", "reward.lr=1e-4", "ppo.lr=1e-4"), []),
        (("sft.lora.rank=8", "reward.lora.rank=8", "ppo.lora.rank=8"), []),
        (("sft.lora.rank=8", "sft.lr=2e-3", "stage=sft"), ["sft"]),
        (("stage=dpo",), ["sft", "dpo"]),
        (("stage=dpo", "sft=recipe", "dpo=recipe"), []),
    ],
)
def test_what_is_too_fast(overrides: tuple[str, ...], stages: list[str]) -> None:
    assert list(warned("model.path=org/large", *overrides)) == stages


def test_its_size_and_what_trains_is_told_where_it_is_known() -> None:
    found = warned("model=pythia_1b", "sft.lr=1e-3", "ppo.lr=1e-3", "reward.use=org/judge")
    assert "every layer of a pretrained model of 1.01 B parameters" in found["sft"]
    assert "the last 2 blocks of a pretrained model" in found["ppo"]


def test_no_experiment_of_the_project_is_warned_of() -> None:
    for name in ("smoke", "demo", "hh_125m", "hh_1b", "hh_gptj_6b", "hh_gptj_6b_p4d", "hh_20b"):
        assert not warned(f"experiment={name}"), name


def test_a_model_that_sft_was_given(small_run: Path) -> None:
    assert list(warned("sft.use=org/large")) == ["reward", "ppo"]
    own = artifact(small_run, "sft").path
    assert not warned(f"sft.use={own}")  # made from scratch by this project


def gpt2(folder: Path, width: int) -> Path:
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 1, "n_positions": 192, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    train_tokenizer(["x"], 258).save_pretrained(folder)
    return folder


def test_a_small_pretrained_model_may_train_fast(tmp_path: Path) -> None:
    assert not warned(f"model.path={gpt2(tmp_path / 'small', 8)}")


def test_nobody_can_miss_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_exp.pipeline.learning_rates.SMALL_PARAMETERS", 100)
    model = f"model.path={gpt2(tmp_path / 'model', 8)}"
    overrides = [*small(tmp_path / "outputs", model), "stage=sft"]
    assert main(["doctor", *overrides]) == 0
    assert "- warning: sft.lr=0.001 (the default" in capsys.readouterr().out
    launch(tmp_path / "outputs", model, "stage=sft")
    assert "warning: sft.lr=0.001 (the default" in " ".join(capsys.readouterr().err.split())
