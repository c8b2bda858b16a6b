"""Logits that families scale and cap in their own ways: measured, and the same in every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_exp.algo.logprobs import LogitTransform
from rlhf_exp.batch import Demonstrations, Prompts
from rlhf_exp.errors import UserError
from rlhf_exp.models.logit_transform import logit_transform
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import build_reference
from rlhf_exp.rollout.sampler import SamplingParams, sample

VOCABULARY = 61

# What each config says, and what transformers' code of the family makes of it.
FAMILIES: dict[str, tuple[dict[str, Any], LogitTransform]] = {
    "llama": ({}, LogitTransform()),
    "granite": ({"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
    "cohere": ({"logit_scale": 0.3}, LogitTransform(scale=0.3)),
    "gemma2": (
        {"final_logit_softcapping": 0.5, "head_dim": 8},
        LogitTransform(cap=0.5),
    ),
    "recurrent_gemma": ({"logits_soft_cap": 2.0}, LogitTransform(cap=2.0)),
    # The states are divided by hidden_size / dim_model_base = 16 / 5.
    "minicpm3": ({"dim_model_base": 5}, LogitTransform(scale=5 / 16)),
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A tiny random model with weights so large that its logits differ."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = AutoConfig.for_model(family, **(fields | FAMILIES.get(family, ({},))[0] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_measured_as_the_config_says(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    forward = model.base_model.forward
    found, expected = logit_transform(model), FAMILIES[family][1]
    assert found.cap == expected.cap
    # Where the config does not name the factor itself, it is known to the type's rounding.
    assert found.scale == pytest.approx(expected.scale, rel=torch.finfo(dtype).eps)
    assert model.base_model.forward == forward


def test_logits_that_are_made_in_another_way_are_refused() -> None:
    # RoBERTa's head has a hidden layer of its own between the states and the vocabulary.
    model = build("roberta", is_decoder=True)
    with pytest.raises(UserError, match="'roberta' model computes its logits in a way that"):
        logit_transform(model)


@pytest.fixture
def capped() -> PreTrainedModel:
    return build("gemma2")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"train_blocks": 1}, {"lora": LoraSettings(rank=2)}],
    ids=["whole", "top block", "lora"],
)
def test_policy_and_reference_have_the_models_own_logits(
    capped: PreTrainedModel, arguments: dict[str, Any]
) -> None:
    tokens = torch.randint(2, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = capped(input_ids=tokens).logits[0].double()
    assert logits.abs().max() > 0.4, "the cap of 0.5 must bite"
    cooled = torch.log_softmax(logits / 0.1, -1)[3:11].gather(1, tokens[0, 4:, None])[:, 0]
    plain = torch.log_softmax(logits, -1)[:11].gather(1, tokens[0, 1:, None])[:, 0]
    policy = Policy(capped, **arguments)
    spans = (tokens, torch.tensor([4]), torch.tensor([8]), 0.1)
    found = policy.response_outputs(*spans).logprobs[0]
    torch.testing.assert_close(found.double(), cooled, rtol=0, atol=2e-5)
    reference = build_reference(policy).logprobs(*spans)[0]
    torch.testing.assert_close(reference.double(), cooled, rtol=0, atol=2e-5)
    batch = Demonstrations(
        tokens=tokens,
        target_mask=torch.arange(12)[None] > 0,
        segments=torch.ones_like(tokens),
        positions=torch.arange(12)[None],
    )
    torch.testing.assert_close(policy(batch).double(), plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_the_sampler_draws_from_the_models_own_logits(family: str) -> None:
    model = build(family)
    prompts = Prompts(
        torch.tensor([[5, 9, 2, 7]]), torch.tensor([4]), torch.tensor([0]), torch.tensor([0])
    )
    settings = SamplingParams(8, temperature=0.1, batch=1, eos_id=-1, pad_id=1)
    samples = sample(model, prompts, settings, seed=0)
    with torch.no_grad():
        logits: Tensor = model(input_ids=samples.tokens).logits[0].double()
    expected = torch.log_softmax(logits / 0.1, -1)[3:11].gather(1, samples.tokens[0, 4:, None])
    torch.testing.assert_close(samples.logprobs[0].double(), expected[:, 0], rtol=0, atol=2e-5)
