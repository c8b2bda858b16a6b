"""Decoded against whole log-probabilities: the check sees what a family does in its own way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_exp.errors import UserError
from rlhf_exp.rollout import slot_cache
from rlhf_exp.rollout.decoder import CacheKind
from rlhf_exp.rollout.decoding_check import decoding_difference

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=4096),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=61,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]],
        window_size=40,
    ),
    "mamba2": lambda: Mamba2Config(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        state_size=4,
        n_groups=2,
    ),
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llama", "slots"),
        ("llama", "library"),
        ("mistral", "slots"),
        ("mistral", "library"),
        ("gpt_neo", "library"),
        ("mamba2", "library"),
    ],
)
def test_right_families_decode_as_the_whole_model(family: str, cache: CacheKind) -> None:
    model = build(family)
    config = copy.deepcopy(model.config)
    assert 0 < decoding_difference(model, cache) < 1e-4
    assert model.config.to_dict() == config.to_dict(), "windows are set back"


def test_local_attention_beyond_its_window_is_seen() -> None:
    assert decoding_difference(build("gpt_neo"), "slots") > 0.01


def test_a_window_that_decoding_forgets_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mistral")
    everything = lambda row, head, query, key: key <= query  # noqa: E731
    masks = slot_cache.ALL_MASK_ATTENTION_FUNCTIONS
    right = masks["sdpa"]

    def forgetful(**kwargs: object) -> torch.Tensor | None:
        return right(
            **(kwargs | {"mask_function": everything} if kwargs["q_length"] == 1 else kwargs)
        )

    monkeypatch.setitem(masks, "sdpa", forgetful)
    assert decoding_difference(model, "slots") > 0.01


def test_a_cache_that_does_not_move_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_cache.SlotCache, "move", lambda self, *slots: None)
    assert decoding_difference(build("llama"), "slots") > 0.01


def test_states_that_slots_cannot_keep_are_refused() -> None:
    with pytest.raises(UserError, match=r"'mamba2' model.*model\.cache=library"):
        decoding_difference(build("mamba2"), "slots")
