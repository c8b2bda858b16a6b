"""The written model of an iteration's time: by hand, and against torch's count of operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.models.reference import build_reference
from rlhf_exp.models.time_estimate import (
    Iteration,
    Models,
    Work,
    block_flops,
    decode_step,
    iteration_work,
    phase_seconds,
)

GPTJ = Architecture("gptj", 28, 4096, 16, 16384, 50400, 2048)
LLAMA = Architecture("llama", 3, 64, 4, 160, 320, 64, kv_heads=2)
NEOX = Architecture("gpt_neox", 3, 64, 4, 256, 320, 64)
SIZES = Iteration(
    rows=6,
    prompt=12,
    response=5,
    decoded_rows=6,
    scored_rows=6,
    epochs=1,
    updates=1,
    micro_batch=6,
)
EAGER = Models(NEOX, skips_masked=False)


def test_one_token_of_gptj_by_hand() -> None:
    # A block has 4 D^2 + 2 D F = 4 * 4096^2 + 2 * 4096 * 16384 = 201 326 592 weights in its
    # matrices, 24 576 more in norm (2 D), and feed-forward biases (F and D); the head D V =
    # 206 438 400. A row's cache: 2 * 4096 numbers a token and layer.
    step = decode_step(GPTJ, rows=64, context=448, weight_bytes=2)
    matrices = 28 * 201_326_592 + 206_438_400
    cache = 64 * 448 * 28 * 2 * 4096
    small = 28 * (2 * 4096 + 16384 + 4096)
    assert step.bytes == 2 * (matrices + small + cache)
    # Scores and their sum over values: 2 * 2 * D operations for each token before and each layer.
    assert step.flops == 2 * 64 * matrices + 4 * 4096 * 64 * 448 * 28
    # 24.8 GB at 4.3 TB/s are 5.8 ms: 11 k tokens a second, as arithmetic needs only 1 ms.
    assert step.seconds(790e12, 4.3e12) == pytest.approx(0.00578, rel=0.01)


def test_attention_by_pairs() -> None:
    # Width 64, F = 160, keys and values of half the width: 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160
    # = 43 008 weights. 10 tokens, 55 pairs of 64 numbers, two products.
    assert block_flops(LLAMA, 10, 55) == 2 * 43_008 * 10 + 4 * 64 * 55


def test_time_is_bound_by_the_slower() -> None:
    parts = {"a": Work(flops=10, bytes=1), "b": Work(flops=2, bytes=12)}
    # a: max(10 / 5, 1 / 3) = 2; b: max(2 / 5, 12 / 3) = 4.
    assert phase_seconds(parts, flops=5, bandwidth=3) == 6
    assert (parts["a"] + parts["b"]) * 2 == Work(24, 26)


def test_an_optimizer_step_by_hand() -> None:
    # With one block of 4: 12 D^2 + 13 D parameters, a final norm of 2 D, and an untied head D V.
    small = Architecture("gpt_neox", 4, 8, 2, 32, 100, 64)
    sizes = replace(SIZES, updates=3)
    work = iteration_work(Models(small, train_blocks=1), sizes)["updating"]
    trained = 12 * 64 + 13 * 8 + 16 + 800
    assert work["optimizer"] == Work(0, 28 * trained * 3)
    # The values' own block is one more, without a head.
    branch = iteration_work(Models(small, train_blocks=1, value_blocks=1), sizes)["updating"]
    assert branch["optimizer"].bytes - work["optimizer"].bytes == 28 * (12 * 64 + 13 * 8) * 3


def test_fewer_rows_together_read_the_weights_more_often() -> None:
    models = Models(NEOX, weight_bytes=2)
    block = 12 * 64**2 + 13 * 64
    weights = 2 * (3 * block + 64 * 320)
    one, two = (
        iteration_work(models, replace(SIZES, decoded_rows=rows))["sampling"]["decode"]
        for rows in (6, 3)
    )
    # Four steps after the prompt's pass, or eight of half as many rows.
    assert two.bytes - one.bytes == 4 * weights
    assert one.flops == two.flops


def test_the_trunk_is_run_once_and_only_where_it_must_be() -> None:
    models = Models(NEOX, train_blocks=1, reward=NEOX)
    work = iteration_work(models, SIZES)
    assert work["assessing"]["trunk"] == Work()
    whole = work["scoring"]["reward model"]
    work = iteration_work(replace(models, captures_states=False), SIZES)
    assert "trunk" not in work["sampling"]
    # Two of three blocks.
    assert work["assessing"]["trunk"].flops == pytest.approx(whole.flops * 2 / 3)
    shared = replace(models, captures_states=False, reward_blocks=1)
    work = iteration_work(shared, SIZES)
    assert work["sampling"]["trunk"].flops == pytest.approx(whole.flops * 2 / 3)
    assert "trunk" not in work["assessing"]
    assert work["scoring"]["reward model"].flops == pytest.approx(whole.flops / 3)
    assert iteration_work(Models(NEOX), SIZES)["scoring"] == {}


def counted(function: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function()  # type: ignore[operator]
    return counter.get_total_flops()


def rows_of(shape: Architecture) -> dict[str, Tensor]:
    tokens = torch.randint(0, shape.vocabulary, (6, 17))
    lengths = {"prompt_lengths": torch.full((6,), 12), "response_lengths": torch.full((6,), 5)}
    return {"tokens": tokens, **lengths}


@pytest.mark.parametrize("train_blocks", [None, 2])
@pytest.mark.parametrize("shape", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
def test_torch_counts_the_same_operations(shape: Architecture, train_blocks: int | None) -> None:
    # Eager attention computes all pairs, and has no kernels of its own that would not be counted.
    policy = Policy(build_causal_lm(shape, 0, attention="eager"), train_blocks)
    reference = build_reference(policy)
    rows = rows_of(shape)
    models = replace(EAGER, policy=shape, train_blocks=train_blocks)
    work = iteration_work(models, SIZES)
    value_head = 2 * 6 * 5 * shape.width  # D operations and their sum for each response token
    states = None if train_blocks is None else policy.trunk_states(rows["tokens"])
    arguments = {"temperature": 1.0, "states": states}
    with torch.no_grad():
        found = counted(lambda: policy.model(rows["tokens"][:, :12], logits_to_keep=1))
        assert work["sampling"]["prefill"].flops == pytest.approx(found, rel=0.01)
        found = counted(lambda: policy.response_outputs(**rows, **arguments)) - value_head
        assert work["assessing"]["policy"].flops == pytest.approx(found, rel=0.01)
        found = counted(lambda: reference.logprobs(**rows, **arguments))
        assert work["assessing"]["reference"].flops == pytest.approx(found, rel=0.01)
        if train_blocks is not None:
            apart = iteration_work(replace(models, captures_states=False), SIZES)["assessing"]
            found = counted(lambda: policy.trunk_states(rows["tokens"]))
            assert apart["trunk"].flops == pytest.approx(found, rel=0.01)

    def update() -> None:
        outputs = policy(**rows, **arguments, width=5)
        (outputs.logprobs.sum() + outputs.values.sum()).backward()

    expected = work["updating"]["forward"].flops + work["updating"]["backward"].flops
    found = counted(update) - 3 * value_head
    # No gradient is needed of what enters the lowest block that trains: the estimate has it.
    assert expected == pytest.approx(found, rel=0.08)
    assert expected >= found
