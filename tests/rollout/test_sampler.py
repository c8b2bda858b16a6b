"""The sampler against full forwards without a cache, over every model family."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_exp.batch import FinishReason, Prompts, Samples
from rlhf_exp.errors import UserError
from rlhf_exp.rollout import sampler
from rlhf_exp.rollout.decoder import CacheKind
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.rollout.slot_cache import SlotLayer
from rlhf_exp.rollout.token_sampling import uniform
from rlhf_exp.rollout.transcript import Stopper

VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT = 61, 16, 3, 4, 64
NO_EOS = -1

GPT_STYLE = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": CONTEXT,
}
LLAMA_STYLE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
NEOX_STYLE = {name: value for name, value in LLAMA_STYLE.items() if name != "num_key_value_heads"}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**GPT_STYLE),
    "gptj": lambda: GPTJConfig(**GPT_STYLE, rotary_dim=4),
    "gpt_neox": lambda: GPTNeoXConfig(**NEOX_STYLE),
    "gpt_neox_eager": lambda: GPTNeoXConfig(**NEOX_STYLE, attn_implementation="eager"),
    "llama": lambda: LlamaConfig(**LLAMA_STYLE),
    "qwen2": lambda: Qwen2Config(**LLAMA_STYLE),
    "qwen3": lambda: Qwen3Config(**LLAMA_STYLE, head_dim=4),
    # Attention to less than everything: one window for all layers, or one for some of them.
    "mistral": lambda: MistralConfig(**LLAMA_STYLE, sliding_window=6),
    "qwen2_windows": lambda: Qwen2Config(
        **LLAMA_STYLE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **LLAMA_STYLE,
        head_dim=4,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_oss": lambda: GptOssConfig(
        **LLAMA_STYLE,
        head_dim=4,
        sliding_window=5,
        num_local_experts=4,
        attn_implementation="eager",
    ),
    # Blocks that keep a state, alone and among blocks of attention.
    "mamba2": lambda: Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_heads=4,
        head_dim=8,
        state_size=4,
        n_groups=2,
        chunk_size=4,
    ),
    "lfm2": lambda: Lfm2Config(
        **LLAMA_STYLE, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    ),
    "falcon_h1": lambda: FalconH1Config(
        **LLAMA_STYLE,
        head_dim=4,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=4,
    ),
    # It attends locally in a way of its own.
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], 1], [["local"], 1]],
        window_size=6,
    ),
}
ONLY_LIBRARY = ("mamba2", "lfm2", "falcon_h1", "gpt_neo")
DECODED = [(family, "slots") for family in FAMILIES if family not in ONLY_LIBRARY] + [
    (family, "library") for family in (*ONLY_LIBRARY, "gpt2", "llama", "gemma3")
]
"""Families, and the cache that they are decoded with."""


def build(family: str = "gpt_neox") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():  # initialised as usual the distribution is almost flat: sharpen it
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return model.eval()


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def make_prompts(lengths: list[int], pad: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length:] = pad
    number = torch.arange(len(lengths))
    return Prompts(tokens, torch.tensor(lengths), index=number + 500, rollout=number + 1000)


def settings(**changes: float) -> SamplingParams:
    values = {"max_new_tokens": 9, "temperature": 0.8, "batch": 4, "eos_id": NO_EOS, "pad_id": 0}
    return SamplingParams(**{**values, **changes})  # type: ignore[arg-type]


def full_forward(model: PreTrainedModel, row: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [S, V] and the states entering each block, of one row without cache or padding."""
    states: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
        for block in blocks(model)
    ]
    with torch.no_grad():
        output = model(row.unsqueeze(0), use_cache=False)
    for hook in hooks:
        hook.remove()
    return output.logits[0], states


LENGTHS = [7, 3, 12, 1, 5, 12, 9]


@pytest.mark.parametrize(("family", "cache"), DECODED)
def test_tokens_logprobs_and_states_are_those_of_the_full_forward(
    family: str, cache: CacheKind
) -> None:
    model, prompts = build(family), make_prompts(LENGTHS)
    cached = replace(settings(), cache=cache)
    samples = sample(model, prompts, cached, seed=5, capture=blocks(model)[1])
    assert samples.index.tolist() == prompts.index.tolist()
    assert samples.states is not None
    for row, length in enumerate(LENGTHS):
        end = length + 9
        assert samples.response_lengths[row] == 9
        assert samples.tokens[row, :length].tolist() == prompts.tokens[row, :length].tolist()
        logits, states = full_forward(model, samples.tokens[row, :end])
        table = torch.log_softmax(logits.double() / 0.8, dim=-1).numpy()
        for column in range(9):
            token = int(samples.tokens[row, length + column])
            logprobs = table[length + column - 1]
            assert samples.logprobs[row, column].item() == pytest.approx(logprobs[token], abs=1e-4)
            # The inverse of the cumulative distribution, in float64.
            number = uniform(5, prompts.rollout[row], torch.tensor(column)).item()
            assert token == np.searchsorted(np.exp(logprobs).cumsum(), number, side="right")
        torch.testing.assert_close(
            samples.states[row, : end - 1], states[1][: end - 1], rtol=1e-4, atol=1e-4
        )
        assert samples.states[row, end - 1 :].abs().sum() == 0


def test_a_cut_distribution_by_the_full_forward_and_the_same_noise() -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    samples = sample(model, prompts, settings(top_p=0.7, top_k=5), seed=5)
    outside = 0
    for row, length in enumerate(LENGTHS):
        logits, _ = full_forward(model, samples.tokens[row, : length + 9])
        table = torch.softmax(logits.double() / 0.8, dim=-1).numpy()
        for column in range(9):
            probabilities = table[length + column - 1]
            kept: list[int] = []
            five = probabilities[np.argsort(-probabilities)[:5]].sum()
            for token in np.argsort(-probabilities)[:5]:
                if probabilities[kept].sum() / five >= 0.7:
                    break
                kept.append(int(token))
            cut = np.zeros(VOCABULARY)
            cut[kept] = probabilities[kept] / probabilities[kept].sum()
            number = uniform(5, prompts.rollout[row], torch.tensor(column)).item()
            token = int(samples.tokens[row, length + column])
            assert token == np.searchsorted(cut.cumsum(), number, side="right")
            assert samples.logprobs[row, column].item() == pytest.approx(
                np.log(cut[token]), abs=1e-4
            )
            outside += token != np.searchsorted(probabilities.cumsum(), number, side="right")
    assert outside > 9  # the cut matters


def test_a_cut_distribution_does_not_depend_on_batch_or_order() -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    cut = settings(top_p=0.7, eos_id=22)
    reference = sample(model, prompts, cut, seed=5, capture=blocks(model)[1])
    order = torch.tensor([4, 0, 6, 2, 1])
    shuffled = sample(
        model, prompts.select(order), replace(cut, batch=2), 5, capture=blocks(model)[1]
    )
    assert_same_rows(shuffled, reference.select(order))


def test_nothing_is_cut_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("training samples from the whole distribution")

    monkeypatch.setattr(sampler, "truncate_logits", refuse)
    model, prompts = build(), make_prompts(LENGTHS)
    sample(model, prompts, settings(), seed=5)
    sample(model, prompts, settings(greedy=True, top_p=0.5), seed=5)
    with pytest.raises(AssertionError, match="whole distribution"):
        sample(model, prompts, settings(top_k=3), seed=5)


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_a_row_does_not_depend_on_batch_order_or_other_rows(batch: int) -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    # An end of sequence that some rows reach makes slots free at different times.
    reference = sample(model, prompts, settings(eos_id=22), seed=5, capture=blocks(model)[1])
    assert 0 < (reference.finish == FinishReason.EOS).sum() < len(LENGTHS)
    order = torch.tensor([4, 0, 6, 2, 1])
    shuffled = sample(
        model, prompts.select(order), settings(eos_id=22, batch=batch), 5, capture=blocks(model)[1]
    )
    assert_same_rows(shuffled, reference.select(order))


def assert_same_rows(one: Samples, other: Samples) -> None:
    width, columns = one.tokens.shape[1], one.logprobs.shape[1]
    for name in ("prompt_lengths", "response_lengths", "content_lengths", "finish", "index"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    assert one.tokens.tolist() == other.tokens[:, :width].tolist()
    torch.testing.assert_close(one.logprobs, other.logprobs[:, :columns], rtol=0, atol=1e-5)
    assert one.states is not None
    assert other.states is not None
    torch.testing.assert_close(one.states, other.states[:, :width], rtol=0, atol=1e-4)


def test_looking_every_few_tokens_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # What an accelerator does: rows run on after their end, and attention reads padded columns.
    model, prompts = build(), make_prompts(LENGTHS)
    reference = sample(model, prompts, settings(eos_id=22), seed=5, capture=blocks(model)[1])
    monkeypatch.setattr(sampler, "on_accelerator", lambda device: True)
    monkeypatch.setattr(sampler, "ACCELERATOR_STRIDE", 5)
    for batch in (2, 7):
        lazy = sample(model, prompts, settings(eos_id=22, batch=batch), 5, capture=blocks(model)[1])
        assert_same_rows(lazy, reference)


def test_end_of_sequence_belongs_to_the_response_but_not_to_its_content() -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    free = sample(model, prompts, settings(), seed=5)
    eos = int(free.tokens[2, LENGTHS[2] + 3])  # what row 2 says fourth, if not before
    samples = sample(model, prompts, settings(eos_id=eos, pad_id=eos), seed=5)
    for row, length in enumerate(LENGTHS):
        said = free.tokens[row, length : length + 9].tolist()
        ends = eos in said
        count = said.index(eos) + 1 if ends else 9
        assert samples.response_lengths[row] == count
        assert samples.content_lengths[row] == count - ends
        assert samples.finish[row] == (FinishReason.EOS if ends else FinishReason.LENGTH)
        assert samples.tokens[row, length : length + count].tolist() == said[:count]
        assert (samples.tokens[row, length + count :] == eos).all()
        assert (samples.logprobs[row, count:] == 0).all()
    assert samples.response_lengths[2] <= 4
    assert samples.tokens.shape[1] == int((samples.prompt_lengths + samples.response_lengths).max())
    assert samples.logprobs.shape[1] == int(samples.response_lengths.max())


def test_every_end_token_ends_a_response() -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    free = sample(model, prompts, settings(), seed=5)
    said = [row[size:].tolist() for row, size in zip(free.tokens, LENGTHS, strict=True)]
    ends = {said[0][2], said[1][4]}
    several = replace(settings(eos_id=said[0][2]), end_ids=frozenset({said[1][4]}))
    samples = sample(model, prompts, several, seed=5)
    for row, tokens in enumerate(said):
        expected = next((n for n, token in enumerate(tokens[:9]) if token in ends), None)
        assert samples.response_lengths[row] == (9 if expected is None else expected + 1)
        assert samples.content_lengths[row] == (9 if expected is None else expected)


def tokenizer_of_letters() -> PreTrainedTokenizerFast:
    """61 tokens: single characters, the first ones being those of "stop:"."""
    characters = list("stop:") + [chr(ord("A") + number) for number in range(VOCABULARY - 5)]
    vocabulary = {character: number for number, character in enumerate(dict.fromkeys(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings_end_a_row_at_a_token_boundary() -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    tokenizer = tokenizer_of_letters()
    free = sample(model, prompts, settings(), seed=5)
    said = free.tokens[4, LENGTHS[4] : LENGTHS[4] + 9].tolist()
    stop = tokenizer.decode(said[3:6])
    assert len(stop) == 3
    samples = sample(model, prompts, settings(), 5, stopper=Stopper(tokenizer, [stop]))
    assert samples.finish[4] == FinishReason.STOP
    assert samples.response_lengths[4] == 6
    assert samples.content_lengths[4] == 3
    assert samples.tokens[4, LENGTHS[4] : LENGTHS[4] + 6].tolist() == said[:6]


def test_greedy_takes_the_most_probable_token_as_generate_does() -> None:
    model, prompts = build("llama"), make_prompts([6, 6, 6])
    samples = sample(model, prompts, settings(greedy=True, temperature=1.0), seed=0)
    expected = model.generate(
        prompts.tokens,
        attention_mask=torch.ones_like(prompts.tokens),
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert samples.tokens.tolist() == expected.tolist()


def test_the_seed_and_the_rollout_number_change_what_is_said() -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    first = sample(model, prompts, settings(), seed=5)
    again = sample(model, prompts, settings(), seed=5)
    other = sample(model, prompts, settings(), seed=6)
    later = Prompts(prompts.tokens, prompts.lengths, prompts.index, prompts.rollout + 10)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens, sample(model, later, settings(), seed=5).tokens)


def test_the_model_is_left_as_it_was_and_dropout_is_off_meanwhile() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_STYLE, attention_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config)
    model.train()
    blocks(model)[0].eval()
    model.gradient_checkpointing_enable()
    modes = [child.training for child in model.modules()]
    one = sample(model, make_prompts([4, 2]), settings(), seed=0, capture=blocks(model)[2])
    two = sample(model, make_prompts([4, 2]), settings(), seed=0, capture=blocks(model)[2])
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.logprobs, two.logprobs)
    assert [child.training for child in model.modules()] == modes
    assert not blocks(model)[2]._forward_pre_hooks


def test_states_can_be_trained_on() -> None:
    model = build()
    samples = sample(model, make_prompts([4, 2]), settings(), seed=0, capture=blocks(model)[2])
    assert samples.states is not None
    nn.Linear(WIDTH, 1)(samples.states).sum().backward()


def test_the_cache_goes_with_the_call() -> None:
    model, prompts = build(), make_prompts([3, 5])
    gc.collect()
    gc.disable()
    try:
        samples = sample(model, prompts, settings(), seed=3)
        kinds = [type(thing) for thing in gc.get_objects()]
        alive = sum(issubclass(kind, CacheLayerMixin | Cache) for kind in kinds)
    finally:
        gc.enable()
    assert len(samples) == 2
    assert alive == 0, "keys and values wait for a collection of cycles"


def test_one_new_token() -> None:
    model, prompts = build(), make_prompts(LENGTHS)
    samples = sample(model, prompts, settings(max_new_tokens=1, batch=2), seed=5)
    assert samples.response_lengths.tolist() == [1] * len(LENGTHS)
    longer = sample(model, prompts, settings(), seed=5)
    starts = prompts.lengths.unsqueeze(1)
    assert torch.equal(samples.tokens.gather(1, starts), longer.tokens.gather(1, starts))


def test_both_caches_give_the_same_samples() -> None:
    model, prompts = build("llama"), make_prompts(LENGTHS)
    stopper = Stopper(tokenizer_of_letters(), ["D"])
    results = []
    for cache in get_args(CacheKind):
        cached = replace(settings(max_new_tokens=14, batch=3, eos_id=9), cache=cache)
        results.append(sample(model, prompts, cached, 5, stopper, blocks(model)[1]))
    slots, library = results
    assert len(set(slots.finish.tolist())) == 3, "every way to end is seen"
    for name in ("tokens", "response_lengths", "content_lengths", "finish", "index"):
        assert torch.equal(getattr(slots, name), getattr(library, name)), name
    torch.testing.assert_close(slots.logprobs, library.logprobs, rtol=0, atol=1e-4)
    assert slots.states is not None
    torch.testing.assert_close(slots.states, library.states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", get_args(CacheKind))
def test_each_response_is_told_once_as_it_ends(cache: CacheKind) -> None:
    """Before the call returns, and while others are not done: here each ends by a token."""
    told: dict[int, tuple[list[int], int]] = {}
    ended: list[int] = []

    def note(row: int, response: list[int], content: int) -> None:
        assert row not in told
        told[row] = response, content

    ends = frozenset(range(VOCABULARY // 4))
    samples = sample(
        build(),
        make_prompts([5, 3, 7, 4, 6]),
        replace(settings(max_new_tokens=12, batch=2), cache=cache, end_ids=ends),
        seed=0,
        on_ended=lambda count: ended.append(len(told)),
        on_row=note,
    )
    assert len(set(ended)) > 2, "some were told of before others"
    assert sorted(told) == list(range(5))
    for row, (response, content) in told.items():
        start, length = int(samples.prompt_lengths[row]), int(samples.response_lengths[row])
        assert response == samples.tokens[row, start : start + length].tolist()
        assert content == int(samples.content_lengths[row])


def test_the_librarys_cache_has_no_closing_states() -> None:
    model = build("llama")
    cached = replace(settings(), cache="library")
    samples = sample(model, make_prompts([4, 2]), cached, 0, capture=blocks(model)[1], close=1)
    assert (samples.states is None, samples.closing) == (False, None)


@pytest.mark.parametrize("family", ["mamba2", "lfm2", "falcon_h1"])
def test_slots_are_refused_where_blocks_keep_a_state(family: str) -> None:
    with pytest.raises(UserError, match=f"'{family}' model.*model.cache=library"):
        sample(build(family), make_prompts([5, 3]), settings(), seed=0)


def test_the_librarys_cache_is_refused_where_there_is_none() -> None:
    model = AutoModelForCausalLM.from_config(OpenAIGPTConfig(**GPT_STYLE))
    with pytest.raises(UserError, match=r"'openai-gpt' model.*returns no cache"):
        sample(model, make_prompts([5, 3]), replace(settings(), cache="library"), seed=0)


def test_more_tokens_than_positions_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"5 tokens.*max_new_tokens=62.* 64 tokens.*seq_length"):
        sample(build("gpt2"), make_prompts([5]), settings(max_new_tokens=62), seed=0)


def test_half_precision_keeps_float32_logprobs() -> None:
    model = build("llama").to(torch.bfloat16)
    samples = sample(model, make_prompts(LENGTHS), settings(), seed=5)
    assert samples.logprobs.dtype == torch.float32
    # Sampled from rounded logits all log-probabilities would be rounded alike: bfloat16 has 8 bits.
    assert (samples.logprobs.bfloat16().float() != samples.logprobs).float().mean() > 0.9


def test_mixed_precision_keeps_keys_and_values_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The keys of this family arrive in float32: they are rotated in it."""
    layers: list[Any] = []
    begin = SlotLayer.__init__

    def noted(self: SlotLayer, *args: Any) -> None:
        begin(self, *args)
        layers.append(self)

    monkeypatch.setattr(SlotLayer, "__init__", noted)
    with torch.autocast("cpu", torch.bfloat16):
        sample(build("gpt_neox"), make_prompts([3, 5]), settings(), seed=0)
    assert len(layers) == LAYERS
    assert {layer.keys.dtype for layer in layers} == {torch.bfloat16}
    assert {layer.values.dtype for layer in layers} == {torch.bfloat16}
