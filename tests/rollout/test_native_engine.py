"""The native engine: the policy itself, or a copy of its weights that is refreshed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.batch import Samples
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.native_engine import NativeEngine, RolloutCopy
from rlhf_exp.rollout.sampler import SamplingParams, sample
from tests.rollout.test_sampler import LENGTHS, make_prompts

PARAMS = SamplingParams(12, 1.0, 4, 1, 0)
REQUEST = RolloutRequest(PARAMS, seed=5)
HALF = torch.bfloat16


def policy_of(family: str = "gpt_neox", tied: bool = False, **how: object) -> Policy:
    shape = Architecture(family, 3, 32, 2, 64, 64, 64, tied=tied)
    return Policy(build_causal_lm(shape, seed=5, eos_id=1, pad_id=0), **how)  # type: ignore[arg-type]


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in bfloat16, made apart from `RolloutCopy`; its buffers as they are."""
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data = weight.data.to(HALF)
    return other


def equal(one: Samples, other: Samples) -> bool:
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.logprobs, other.logprobs)


def move(policy: Policy) -> None:
    """Train a little: far enough that other tokens are drawn."""
    torch.manual_seed(0)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight)


def test_the_policys_own_weights_answer_and_are_followed() -> None:
    policy = policy_of(train_blocks=1)
    engine, prompts = NativeEngine(policy), make_prompts(LENGTHS)
    engine.refresh(0)
    before = engine.answer(prompts, REQUEST)
    assert equal(before, sample(policy.model, prompts, PARAMS, 5))
    move(policy)
    assert not equal(before, engine.answer(prompts, REQUEST))


def test_states_are_captured_where_they_are_asked_for() -> None:
    policy = policy_of(train_blocks=1)
    engine, prompts = NativeEngine(policy), make_prompts(LENGTHS)
    assert engine.answer(prompts, REQUEST).states is None
    samples = engine.answer(prompts, RolloutRequest(PARAMS, 5, capture=True))
    assert samples.states is not None
    expected = policy.trunk_states(samples.tokens)
    for row, length in enumerate(samples.prompt_lengths + samples.response_lengths - 1):
        torch.testing.assert_close(
            samples.states[row, :length], expected[row, :length], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "llama", "gpt2"])
def test_a_copy_answers_as_a_model_of_rounded_weights(family: str) -> None:
    policy = policy_of(family, train_blocks=1)
    engine, prompts = NativeEngine(policy, HALF), make_prompts(LENGTHS)
    engine.refresh(0)
    before = engine.answer(prompts, REQUEST)
    assert equal(before, sample(rounded(policy.model), prompts, PARAMS, 5))
    move(policy)
    # Until it is refreshed it stays as it was, and it is only where the version is another.
    assert equal(before, engine.answer(prompts, REQUEST))
    engine.refresh(0)
    assert equal(before, engine.answer(prompts, REQUEST))
    engine.refresh(1)
    after = engine.answer(prompts, REQUEST)
    assert not equal(before, after)
    assert equal(after, sample(rounded(policy.model), prompts, PARAMS, 5))


def test_a_copy_keeps_its_addresses_and_shares_what_is_frozen_in_its_format() -> None:
    policy = policy_of(train_blocks=1)
    for weight in policy.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(HALF)
    copied = RolloutCopy(policy.model, HALF)
    addresses = {name: weight.data_ptr() for name, weight in copied.model.named_parameters()}
    move(policy)
    copied.refresh()
    found = dict(copied.model.named_parameters())
    assert {name: weight.data_ptr() for name, weight in found.items()} == addresses
    for name, weight in policy.model.named_parameters():
        assert (found[name].data_ptr() == weight.data_ptr()) == (not weight.requires_grad), name
        assert torch.equal(found[name], weight.to(HALF)), name


def test_a_copy_has_the_adapter_in_its_weights() -> None:
    policy = policy_of("llama", lora=LoraSettings(4, 8.0))
    move(policy)
    copied = RolloutCopy(policy.model, torch.float32)
    copied.refresh()
    assert not any("lora" in name for name, _ in copied.model.named_parameters())
    tokens = make_prompts([9, 9]).tokens
    with torch.no_grad():
        expected: Tensor = policy.model(tokens).logits
        found: Tensor = copied.model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_stays_tied() -> None:
    policy = policy_of("llama", tied=True)
    model = RolloutCopy(policy.model, HALF).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.fixture
def half_world() -> World:
    with world_of("bfloat16", threads=1) as world:
        return world


def test_frozen_weights_are_rounded_while_training_and_exact_after_it(half_world: World) -> None:
    policy = policy_of(train_blocks=1)
    exact = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    half_world.round_frozen(policy)
    for name, weight in policy.named_parameters():
        expected = exact[name] if weight.requires_grad else exact[name].to(HALF)
        assert weight.dtype == expected.dtype
        assert torch.equal(weight, expected), name
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    half_world.prepare(policy, lambda: torch.optim.SGD(trained, lr=0.1), 1.0)
    half_world.release()
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, exact[name]), name


def test_nothing_is_rounded_in_float32() -> None:
    policy = policy_of(train_blocks=1)
    with world_of("float32", threads=1) as world:
        world.round_frozen(policy)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
