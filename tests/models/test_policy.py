"""The policy's numbers against the whole model's logits, and what of it trains.

What of a policy trains, and how its forward runs while it does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.models.policy import Policy, ResponseOutputs, ValueHead
from rlhf_exp.models.pretrained import load_causal_lm, load_head, load_tokenizer

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]
TEMPERATURE = 0.7


def expected_outputs(policy: Policy, rows: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities, entropies and values row by row, unpadded, in numpy's float64."""
    shape = (len(rows["tokens"]), int(rows["response_lengths"].max()))
    logprobs, entropies, values = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    assert policy.value_head is not None
    weight = policy.value_head.weight.detach().double().numpy()
    for row, (tokens, prompt, response) in enumerate(zip(*rows.values(), strict=True)):
        sequence = tokens[None, : prompt + response]
        with torch.no_grad():
            logits = policy.model(sequence).logits[0].double().numpy() / TEMPERATURE
            hidden = policy.model.base_model(sequence).last_hidden_state[0].double().numpy()
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for step in range(response):
            before = prompt + step - 1
            logprobs[row, step] = table[before, tokens[prompt + step]]
            entropies[row, step] = -(np.exp(table[before]) * table[before]).sum()
            values[row, step] = hidden[before] @ weight
    return logprobs, entropies, values


@pytest.mark.parametrize("train_blocks", [None, 2])
def test_outputs_are_those_of_each_row_alone(
    tiny: Build, family: str, rows: Batch, train_blocks: int | None
) -> None:
    policy = Policy(tiny(family), train_blocks).train()
    found = policy.response_outputs(**rows, temperature=TEMPERATURE, with_entropy=True)
    logprobs, entropies, values = expected_outputs(policy, rows)
    assert found.entropy is not None
    np.testing.assert_allclose(found.logprobs.detach(), logprobs, atol=2e-5)
    np.testing.assert_allclose(found.entropy.detach(), entropies, atol=2e-5)
    np.testing.assert_allclose(found.values.detach(), values, atol=2e-5)


def test_cached_states_give_what_the_full_forward_gives(
    tiny: Build, family: str, rows: Batch
) -> None:
    policy = Policy(tiny(family), train_blocks=2).train()
    states = policy.trunk_states(rows["tokens"])
    # What the sampler hands on: the last token of a response was never fed, its state is 0.
    ends = rows["prompt_lengths"] + rows["response_lengths"]
    states[torch.arange(4), ends - 1] = 0
    found = policy.response_outputs(**rows, temperature=TEMPERATURE, states=states)
    logprobs, _, values = expected_outputs(policy, rows)
    np.testing.assert_allclose(found.logprobs.detach(), logprobs, atol=2e-5)
    np.testing.assert_allclose(found.values.detach(), values, atol=2e-5)


def test_pretrained_model_from_cached_states(shared_data: Path) -> None:
    model = load_causal_lm(shared_data / "stories260k")
    tokenizer = load_tokenizer(shared_data / "stories260k")
    texts = ["Once upon a time there was a dog named Max.", "Lily had a red ball and a kite."]
    ids = [tokenizer(text).input_ids for text in texts]
    tokens = torch.zeros(2, max(map(len, ids)), dtype=torch.int64)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    rows = {
        "tokens": tokens,
        "prompt_lengths": torch.tensor([4, 3]),
        "response_lengths": torch.tensor([len(sequence) for sequence in ids])
        - torch.tensor([4, 3]),
    }
    policy = Policy(model, train_blocks=2)
    states = policy.trunk_states(tokens)
    found = policy.response_outputs(**rows, temperature=TEMPERATURE, states=states)
    logprobs, _, _ = expected_outputs(policy, rows)
    np.testing.assert_allclose(found.logprobs.detach(), logprobs, atol=1e-4)


def test_rows_do_not_depend_on_each_other_or_on_padding(
    tiny: Build, family: str, rows: Batch
) -> None:
    policy = Policy(tiny(family), train_blocks=2)
    whole = policy.response_outputs(**rows, temperature=TEMPERATURE)
    order = torch.tensor([2, 0])
    part = {name: tensor[order] for name, tensor in rows.items()}
    # Other rows, a wider batch, and rubbish where there was padding.
    ends = part["prompt_lengths"] + part["response_lengths"]
    wide = torch.full((2, 23), 5)
    wide[:, :15] = part["tokens"]
    wide[torch.arange(23) >= ends[:, None]] = 77
    part["tokens"] = wide
    some = policy.response_outputs(**part, temperature=TEMPERATURE, width=12)
    assert (some.logprobs - whole.logprobs[order]).abs().max() < 2e-5
    assert (some.values - whole.values[order]).abs().max() < 2e-5


def test_left_padded_forward_of_the_library_agrees(tiny: Build, family: str, rows: Batch) -> None:
    policy = Policy(tiny(family))
    found = policy.response_outputs(**rows, temperature=1.0).logprobs
    ends = rows["prompt_lengths"] + rows["response_lengths"]
    shift = 15 - ends
    place = torch.arange(15) - shift[:, None]
    tokens = rows["tokens"].gather(1, place.clamp(min=0))
    logits = policy.model(
        tokens, attention_mask=(place >= 0).long(), position_ids=place.clamp(min=0)
    ).logits
    table = logits.log_softmax(-1)
    for row, (start, count) in enumerate(
        zip(shift + rows["prompt_lengths"], rows["response_lengths"], strict=True)
    ):
        at = torch.arange(int(start), int(start + count))
        expected = table[row, at - 1, tokens[row, at]]
        assert (found[row, :count] - expected).abs().max() < 2e-5


# Not GPT-J: it has eager attention only, which adds a mask.
@pytest.mark.parametrize("sdpa_family", ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"])
def test_no_attention_mask_is_made_for_whole_blocks(
    tiny: Build, sdpa_family: str, rows: Batch
) -> None:
    policy = Policy(tiny(sdpa_family), train_blocks=2)
    attend = nn.functional.scaled_dot_product_attention
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=attend) as calls:
        policy.response_outputs(**rows, temperature=1.0)
    assert calls.call_count == 4
    assert all(call.kwargs["attn_mask"] is None for call in calls.call_args_list[:3])
    assert all(call.kwargs["is_causal"] is True for call in calls.call_args_list[:3])


def test_half_precision_keeps_its_heads_in_float32(tiny: Build, family: str, rows: Batch) -> None:
    """In bfloat16 the error against float32 is the model's: the head adds none of its own."""
    model = tiny(family)
    exact = Policy(model).response_outputs(**rows, temperature=1.0)
    half = Policy(tiny(family).to(torch.bfloat16), train_blocks=2)
    found = half.response_outputs(**rows, temperature=1.0)
    assert found.logprobs.dtype == found.values.dtype == torch.float32
    with torch.no_grad():
        table = half.model(rows["tokens"]).logits.float().log_softmax(-1)
    errors = []
    for row, (prompt, count) in enumerate(
        zip(rows["prompt_lengths"], rows["response_lengths"], strict=True)
    ):
        at = torch.arange(int(prompt), int(prompt + count))
        library = table[row, at - 1, rows["tokens"][row, at]]
        truth = exact.logprobs[row, :count]
        errors.append(((found.logprobs[row, :count] - truth).abs(), (library - truth).abs()))
    ours, theirs = (torch.cat(list(part)).mean() for part in zip(*errors, strict=True))
    assert ours <= 1.5 * theirs


def test_value_model_of_its_own(tiny: Build, rows: Batch) -> None:
    policy = Policy(tiny("llama"), train_blocks=2, value_model=tiny("llama", seed=1))
    assert policy.value_trunk is not None
    assert policy.value_head is not None
    assert all(parameter.requires_grad for parameter in policy.value_trunk.parameters())
    hidden = policy.value_trunk(rows["tokens"]).last_hidden_state
    values = hidden @ policy.value_head.weight
    found = policy.response_outputs(**rows, temperature=1.0).values
    assert (found[1, :12] - values[1, 2:14]).abs().max() < 1e-6


def test_value_branch_reads_the_trunk_and_trains_alone(
    tiny: Build, family: str, rows: Batch
) -> None:
    model = tiny(family)
    with torch.no_grad():
        hidden = model.base_model(rows["tokens"]).last_hidden_state
    policy = Policy(model, train_blocks=2, value_branch=True)
    assert policy.value_head is not None
    assert policy.value_trunk is not None
    values = hidden @ policy.value_head.weight
    states = policy.trunk_states(rows["tokens"])
    for given in (None, states):
        found = policy.response_outputs(**rows, temperature=1.0, states=given)
        assert (found.values[1, :12] - values[1, 2:14]).abs().max() < 1e-5
    found.values.sum().backward()
    moved = {name for name, value in policy.named_parameters() if value.grad is not None}
    own = {f"value_trunk.{name}" for name, _ in policy.value_trunk.named_parameters()}
    assert moved == own | {"value_head.weight", "value_head.bias"}
    trained = {name for name, _ in policy.trainable_named_parameters()}
    assert own < trained
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += parameter.requires_grad * 1.0
    again = policy.response_outputs(**rows, temperature=1.0, states=states)
    assert torch.equal(again.values, found.values)
    assert not torch.allclose(again.logprobs, found.logprobs)


def test_value_head_starts_small_or_as_the_reward_head(rows: Batch) -> None:
    head = ValueHead(64, seed=3)
    assert 0 < head(torch.ones(5, 64)).abs().max() < 0.5
    assert torch.equal(head.weight, ValueHead(64, seed=3).weight)
    head.copy_from(torch.full((1, 64), 0.5), -2.0)
    assert torch.equal(head(torch.ones(5, 64)), torch.full((5,), 30.0))  # 64 * 0.5 - 2


def test_without_value_head_values_are_zero(tiny: Build, rows: Batch) -> None:
    outputs = Policy(tiny("gpt2"), value_head=False).response_outputs(**rows, temperature=1.0)
    assert torch.equal(outputs.values, torch.zeros(4, 12))


def test_saved_policy_is_a_plain_folder(tiny: Build, shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "stories260k")
    policy = Policy(tiny("gpt_neox"), train_blocks=2, value_model=tiny("gpt2"))
    policy.save(tmp_path, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "value_head.safetensors",
        "value_model",
    }
    tokens = torch.arange(10)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(tokens).logits, policy.model(tokens).logits)
    assert plain.num_parameters() == policy.model.num_parameters()
    head = ValueHead(32, seed=9)
    load_head(head, tmp_path / "value_head.safetensors")
    assert policy.value_head is not None
    assert torch.equal(head.weight, policy.value_head.weight)


def test_forward_is_what_wrappers_see(tiny: Build, rows: Batch) -> None:
    outputs = Policy(tiny("gpt2"))(**rows, temperature=1.0)
    assert isinstance(outputs, ResponseOutputs)


def test_top_blocks_norm_and_untied_head_train(tiny: Build, family: str) -> None:
    policy = Policy(tiny(family), train_blocks=1)
    parts = decoder_parts(policy.model)
    expected = list(parts.blocks[3].parameters()) + list(parts.norm.parameters())
    assert parts.head is not None
    if family not in ("gpt2", "qwen3"):  # those two are tied
        expected += list(parts.head.parameters())
    assert policy.value_head is not None
    expected += [policy.value_head.weight, policy.value_head.bias]
    trained = {id(value) for _, value in policy.trainable_named_parameters()}
    assert trained == {id(value) for value in expected}
    assert policy.frozen_blocks == 3


def test_everything_trains_by_default_each_parameter_once(tiny: Build, family: str) -> None:
    policy = Policy(tiny(family))
    assert policy.frozen_blocks is None
    names = [name for name, _ in policy.trainable_named_parameters()]
    assert len(names) == len(set(names)) == len(list(policy.model.parameters())) + 2


def test_frozen_trunk_gets_no_gradient(tiny: Build, family: str, rows: Batch) -> None:
    policy = Policy(tiny(family), train_blocks=2).train()
    outputs = policy(**rows, temperature=1.0)
    (outputs.logprobs.sum() + outputs.values.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_gradient_from_cached_states_is_the_same(tiny: Build, family: str, rows: Batch) -> None:
    policy = Policy(tiny(family), train_blocks=2).train()
    gradients = []
    for states in (None, policy.trunk_states(rows["tokens"])):
        policy.zero_grad()
        policy(**rows, temperature=1.0, states=states).logprobs.sum().backward()
        gradients.append(
            [p.grad for _, p in policy.trainable_named_parameters() if p.grad is not None]
        )
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("train_blocks", [None, 2])
def test_checkpointing_recomputes_in_train_mode(
    tiny: Build, family: str, rows: Batch, train_blocks: int | None
) -> None:
    policy = Policy(tiny(family), train_blocks).train().set_gradient_checkpointing(True)
    block = decoder_parts(policy.model).blocks[3]
    kind = type(
        getattr(block, "attn", None) or getattr(block, "attention", None) or block.self_attn
    )
    states = None if train_blocks is None else policy.trunk_states(rows["tokens"])
    with mock.patch.object(kind, "forward", autospec=True, side_effect=kind.forward) as calls:
        outputs = policy(**rows, temperature=1.0, states=states)
        forward = calls.call_count
        outputs.logprobs.sum().backward()
        assert forward == (train_blocks or 4)
        assert calls.call_count == 2 * forward  # once more each in the backward pass
    checkpointed = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    other = Policy(tiny(family), train_blocks, run_all_positions=True).train()
    other(**rows, temperature=1.0, states=states).logprobs.sum().backward()
    plain = [p.grad for p in other.parameters() if p.grad is not None]
    for one, other in zip(checkpointed, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=89, bos_token_id=1, eos_token_id=1),
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=89,
            attention_dropout=0.3,
        ),
    ],
)
def test_dropout_is_off_in_train_mode(config: PreTrainedConfig, rows: Batch) -> None:
    model = AutoModelForCausalLM.from_config(config).train()
    assert not torch.equal(model(rows["tokens"]).logits, model(rows["tokens"]).logits)
    policy = Policy(model).train()
    first, again = (policy(**rows, temperature=1.0).logprobs for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("train_blocks", [0, 5, -1])
def test_number_of_blocks_out_of_range(tiny: Build, train_blocks: int) -> None:
    with pytest.raises(UserError, match=f"train_blocks={train_blocks}: the model has 4 blocks"):
        Policy(tiny("gpt2"), train_blocks)
