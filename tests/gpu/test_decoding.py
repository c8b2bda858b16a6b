"""Decoding on a GPU: by CUDA graphs against step by step, in bfloat16 against float32."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.rollout import gptj_attention, sampler, step_graphs
from rlhf_exp.rollout.sampler import SamplingParams, sample

pytestmark = pytest.mark.gpu

EOS = 7
LLAMA_STYLE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**LLAMA_STYLE),
    "gptj": GPTJConfig(
        vocab_size=1000,
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=256,
        rotary_dim=32,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": LlamaConfig(**LLAMA_STYLE, num_key_value_heads=2),
}


def build(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    return model.to("cuda", dtype).eval()


def answer(model: PreTrainedModel, new: int = 64) -> Samples:
    """Answer 40 prompts in 24 slots; responses end at all lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 40, (40,), generator=generator)
    tokens = torch.randint(20, 1000, (40, 40), generator=generator)
    numbers = torch.arange(40)
    prompts = Prompts(tokens, lengths, numbers, numbers).to("cuda")
    params = SamplingParams(new, 1.0, 24, EOS, 0, end_ids=frozenset(range(8, 20)))
    block: nn.Module = decoder_parts(model).blocks[2]
    return sample(model, prompts, params, seed=5, capture=block, close=EOS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_draw_what_steps_draw(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    family: str,
    dtype: torch.dtype,
) -> None:
    replays = 0
    record = step_graphs.CudaRecorder.record

    def counting(self: step_graphs.CudaRecorder, step: Any) -> Any:
        replay = record(self, step)

        def counted() -> None:
            nonlocal replays
            replays += 1
            replay()

        return counted

    monkeypatch.setattr(step_graphs.CudaRecorder, "record", counting)
    model = build(family, dtype)
    with caplog.at_level(logging.WARNING):
        first, second = answer(model), answer(model)
    assert not caplog.text, "no fallback"
    assert replays > 100
    monkeypatch.setattr(sampler, "step_recorder", lambda device: None)
    expected = answer(model)
    for found in (first, second):
        assert torch.equal(found.tokens, expected.tokens)
        for name in ("logprobs", "states", "closing"):
            assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_draws_mostly_what_float32_draws(family: str) -> None:
    """The noise is the same, so tokens differ only where rounding moves a boundary across it."""
    exact = answer(build(family, torch.float32), new=1)
    half = answer(build(family, torch.bfloat16), new=1)
    same = (exact.tokens == half.tokens).all(1)
    assert same.float().mean() > 0.8
    error = (exact.logprobs - half.logprobs)[same].abs()
    assert error.max() < 0.05


def test_gptj_takes_the_fused_kernel() -> None:
    model = build("gptj", torch.bfloat16)
    answer(model, new=2)
    assert gptj_attention._RIGHT[model], "its outputs are the library's"


def test_a_step_that_reads_the_device_is_decoded_without_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("llama", torch.float32)
    expected = answer(model)
    other = build("llama", torch.float32)

    def reads(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.max().item()

    other.model.layers[1].mlp.register_forward_hook(reads)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(answer(other).tokens, expected.tokens)
    assert caplog.text.count("without graphs") == 1
    torch.cuda.synchronize()
