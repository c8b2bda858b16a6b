"""What a model that is brought cannot be used for is known before it is trained, and what works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf_exp.data.tokenizer import train_tokenizer
from rlhf_exp.errors import UserError
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.stages import model_check
from rlhf_exp.stages.model_check import (
    ModelUse,
    Problem,
    StageUse,
    check_model,
    check_reward_model,
)
from tests.models.families import tiny_model

EVERYTHING = ModelUse(
    (
        StageUse("sft", packing=True, checkpointing=True),
        StageUse("ppo", train_blocks=2),
        StageUse("reward", lora=LoraSettings(rank=2)),
    ),
    "slots",
)


def saved(folder: Path, family: str) -> str:
    tiny_model(family).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "gpt_oss"])
def test_a_right_family_has_no_problems(family: str, tmp_path: Path) -> None:
    assert check_model(saved(tmp_path, family), None, EVERYTHING) == []


def test_a_hybrid_is_refused_with_what_works(tmp_path: Path) -> None:
    path = saved(tmp_path, "lfm2")
    problems = dict(check_model(path, None, EVERYTHING))
    assert list(problems) == ["sft.packing", "model.cache"]
    assert problems["sft.packing"].startswith("a 'lfm2' model mixes the rows that are packed into")
    assert problems["sft.packing"].endswith("nats a token); set sft.packing=false")
    packing = ModelUse((StageUse("sft"), StageUse("dpo", packing=True)))
    ((option, text),) = check_model(path, None, packing)
    assert option == "dpo.packing"
    assert text.endswith("nats a token); set dpo.packing=false")
    assert problems["model.cache"].endswith("; set model.cache=library")
    assert check_model(path, None, ModelUse((StageUse("sft"),), "library")) == []


def test_positions_scaled_by_the_batch_limit_the_rows(tmp_path: Path) -> None:
    model = tiny_model("phi3, longrope")
    model.config.original_max_position_embeddings = 40
    model.config.rope_parameters["original_max_position_embeddings"] = 40
    model.save_pretrained(tmp_path)
    path = str(tmp_path)
    assert check_model(path, None, ModelUse((StageUse("sft"),), longest=40)) == []
    ((option, text),) = check_model(path, None, ModelUse((StageUse("sft"),), longest=48))
    assert option == "model.path"
    assert "once that has more than 40 tokens" in text
    assert text.endswith("; lower the seq_length of every stage to 40")


def test_a_family_that_computes_with_the_strength_of_its_noise(tmp_path: Path) -> None:
    # PhiMoE masks experts by its jitter in eval mode, too: without it, it is another model.
    ((option, text),) = check_model(saved(tmp_path, "phimoe"), None, EVERYTHING)
    assert option == "model.path"
    assert "'phimoe' model draws random numbers in training that cannot be switched off" in text


def test_nothing_is_advised_that_is_wrong_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, "llama")
    monkeypatch.setattr(model_check, "decoding_difference", lambda model, cache: 0.5)
    assert check_model(path, None, EVERYTHING) == [
        Problem(
            "model.cache",
            "sampling with model.cache=slots is not what a 'llama' model computes (off by 0.5 nats "
            "a token); train SFT or the reward model only, or use another model",
        )
    ]


def test_flash_attention_of_a_family_that_is_sampled_from_without(tmp_path: Path) -> None:
    use = replace(EVERYTHING, attention="flash_attention_2")
    ((option, text),) = check_model(saved(tmp_path / "gptj", "gptj"), None, use)
    assert option == "model.attention"
    assert "a 'gptj' model cannot be sampled from with flash_attention_2" in text
    assert text.endswith("; set model.attention=eager")
    assert check_model(saved(tmp_path / "llama", "llama"), None, use) == []


def test_an_implementation_of_attention_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def difference(model: Any, cache: str) -> float:
        return float("nan") if model.config._attn_implementation == "sdpa" else 0.0

    path = saved(tmp_path, "llama")
    monkeypatch.setattr(model_check, "decoding_difference", difference)
    ((option, text),) = check_model(path, None, EVERYTHING)
    assert option == "model.cache"
    assert "off by nan nats" in text
    assert text.endswith(", or model.attention=eager")


def test_a_large_model_is_compared_by_its_lowest_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def difference(model: Any, cache: str) -> float:
        counts.append(len(model.base_model.layers))
        return 0.0

    monkeypatch.setattr(model_check, "decoding_difference", difference)
    paths = [saved(tmp_path / family, family) for family in ("gemma2", "cohere2")]
    types = tiny_model("cohere2").config.layer_types
    for parameters in (model_check.WHOLE_PARAMETERS, 1000):
        monkeypatch.setattr(model_check, "WHOLE_PARAMETERS", parameters)
        for path in paths:
            assert check_model(path, None, ModelUse((StageUse("sft"),), "slots")) == []
    # Gemma 2's layers alternate; of Cohere 2's the first three have a window.
    assert types == ["sliding_attention", "full_attention", *["sliding_attention"] * 2]
    assert counts == [4, 4, 2, 2]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder has no config"):
        check_model(str(tmp_path), None, EVERYTHING)


def classifier(folder: Path, family: str) -> str:
    config = tiny_model(family).config
    config.num_labels, config.pad_token_id = 1, 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "qwen2"])
def test_a_classifier_that_scores_as_the_library(family: str, tmp_path: Path) -> None:
    assert check_reward_model(classifier(tmp_path, family), "sdpa") == []


def test_a_reward_model_of_this_project(tmp_path: Path) -> None:
    reward = RewardModel(tiny_model("llama"), seed=1)
    reward.set_normalisation(0.5, 2.0)
    with torch.no_grad():
        reward.head.weight.mul_(100)
    reward.save(tmp_path, train_tokenizer(["x"], 258))
    assert check_reward_model(str(tmp_path), "sdpa") == []


def test_scores_that_are_not_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scores = classifier(tmp_path, "llama"), RewardModel.scores

    def one_too_early(self: RewardModel, tokens: Tensor, lengths: Tensor) -> Tensor:
        return scores(self, tokens, lengths - 1)

    monkeypatch.setattr(RewardModel, "scores", one_too_early)
    (problem,) = check_reward_model(path, "sdpa")
    assert problem.option == "model.path"
    assert "scores of a 'llama' model depend on the other rows of its batch" in problem.text
    assert "use another model" in problem.text


def test_a_large_one_by_its_lowest_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = classifier(tmp_path, "llama")
    monkeypatch.setattr(model_check, "WHOLE_PARAMETERS", 0)
    loaded: list[int] = []
    load = model_check.load_pretrained

    def noted(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        loaded.append(model.config.num_hidden_layers)
        return model

    monkeypatch.setattr(model_check, "load_pretrained", noted)
    assert check_reward_model(path, "sdpa") == []
    assert loaded == [2]
