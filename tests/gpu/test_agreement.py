"""The GPU against the CPU, in float32."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlhf_exp.hardware import gpu_limits
from rlhf_exp.rollout.token_sampling import draw_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu as benchmark

pytestmark = pytest.mark.gpu


def test_noise_tokens_logprobs_and_gradients(tmp_path: Path) -> None:
    found = benchmark.agreement(benchmark.Run(tmp_path, 100.0, tiny=True))
    assert found.pop("noise is equal") is True
    for kind, values in found.items():
        assert values["equal tokens"] > 0.99, kind
        assert values["log-probabilities differ by"] < 1e-3, kind
        assert values["gradient differs by"] < 1e-3, kind
        assert values["decoding and forward differ by"] < 1e-3, kind
        assert values["equal tokens with fewer rows"] > 0.99, kind


def test_a_row_alone_is_drawn_as_among_others() -> None:
    """Sums along a single row may be by another kernel than those of many."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(64, 128256, device="cuda")
    uniforms = torch.rand(64, device="cuda")
    together = draw_tokens(logits, uniforms)[0]
    alone = torch.cat(
        [draw_tokens(logits[row : row + 1], uniforms[row : row + 1])[0] for row in range(64)]
    )
    assert float((alone == together).double().mean()) > 0.98


def test_limits_are_those_of_a_gpu() -> None:
    limits = gpu_limits()
    assert limits is not None
    assert limits.flops["bfloat16"] > limits.flops["float32"] > 1e12
    assert limits.bandwidth > 1e11
    assert limits.memory == torch.cuda.get_device_properties(0).total_memory
