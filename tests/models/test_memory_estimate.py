"""The memory plan: exact parts by hand, activations against what autograd keeps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.algo import logprobs
from rlhf_exp.distributed import deepspeed
from rlhf_exp.models.architecture import Architecture, count_parameters
from rlhf_exp.models.memory_estimate import (
    BUCKET,
    CHUNK_ROWS,
    FLOAT32,
    HALF_WITH_MASTER,
    LOGITS_CHUNK,
    MemoryEstimate,
    Precision,
    Sharding,
    Workload,
    block_activations,
    estimate_memory,
)

Build = Callable[..., PreTrainedModel]
GPTJ = Architecture("gptj", 28, 4096, 16, 16384, 50400, 2048)
RECIPE = Workload(rows=4, tokens=512, head_tokens=128, decoded_rows=64, cached_rows=64)


def test_published_recipe_by_hand() -> None:
    plan = estimate_memory(
        GPTJ,
        RECIPE,
        HALF_WITH_MASTER,
        Sharding(processes=7, optimizer=True, gradients=True, bucket=True),
        train_blocks=2,
        reference="shared",
    )
    trained = 2 * 201_355_264 + 8_192 + 206_488_800  # blocks, norm, head: see test_architecture
    assert plan.weights == 6_050_882_784 * 2
    assert plan.optimizer == -(-trained // 7) * 12
    # this process's part in float32, and a bucket of 200 million in bfloat16
    assert plan.gradients == -(-trained // 7) * 4 + 200_000_000 * 2
    assert plan.reference == trained * 2
    # 64 rows * 512 tokens * 28 layers * (keys and values 2 * 16 heads * 256 wide) * 2 bytes
    assert plan.kv_cache == 64 * 512 * 28 * 8192 * 2
    assert plan.trunk_states == 64 * 512 * 4096 * 2
    assert plan.logits == 2 * 4 * 4 * 128 * 50400  # logits and gradient in float32, one chunk
    # More than one bucket: a copy of each is reduced while activations are there; as large is the
    # copy of this process's part when it is stepped, and larger here.
    assert plan.communication == max(200_000_000 * 2, -(-trained // 7) * 4)
    update = plan.gradients + plan.activations + plan.logits + plan.communication
    assert plan.peak == (
        plan.weights
        + plan.optimizer
        + plan.reference
        + plan.trunk_states
        + max(update, plan.kv_cache)
    )


def test_fsdp_makes_two_blocks_and_the_rest_whole() -> None:
    plan = estimate_memory(GPTJ, RECIPE, sharding=Sharding(8, weights=True, blocks=True))
    rest = 6_050_882_784 - 28 * 201_355_264  # embeddings, norm, head
    assert plan.weights == 6_050_882_784 // 8 * 4
    assert plan.gathered == (rest + 2 * 201_355_264) * 4
    assert plan.gathered_to_sample == 6_050_882_784 * 4
    assert plan.gradients == 6_050_882_784 // 8 * 4 + (rest + 2 * 201_355_264) * 4
    assert plan.optimizer == 6_050_882_784 // 8 * 8


def test_zero3_leaves_a_billion_weights_whole() -> None:
    sharding = Sharding(8, weights=True, bucket=True, keeps_gradients=True)
    plan = estimate_memory(GPTJ, replace(RECIPE, decoded_rows=0), HALF_WITH_MASTER, sharding)
    assert plan.gathered == 1_000_000_000 * 2
    assert plan.gathered_to_sample == 0  # nothing is sampled
    assert plan.gradients == 6_050_882_784 // 8 * 4 + 200_000_000 * 2
    assert plan.communication == 6_050_882_784 // 8 * 4, "gradients in one piece, to be stepped"


BLOCK = 201_355_264
"""Parameters of a block of GPT-J, of 28."""


def test_frozen_models_are_divided_block_by_block() -> None:
    sharding = Sharding(8, weights=True, blocks=True)
    plan = estimate_memory(GPTJ, RECIPE, sharding=sharding, reference="full", reward_model=GPTJ)
    around = 6_050_882_784 - 28 * BLOCK  # embeddings, norm, head
    assert plan.reference == (28 * BLOCK // 8 + around) * 4
    assert plan.reward_model == (28 * BLOCK // 8 + around - 206_488_800) * 4, "it has no head"
    # The policy is whole meanwhile, and two blocks of the frozen model that computes.
    assert plan.gathered_to_sample == (6_050_882_784 + 2 * BLOCK) * 4
    away = replace(sharding, offload=True)
    offloaded = estimate_memory(GPTJ, RECIPE, sharding=away, reference="full")
    assert offloaded.reference == around * 4
    without = estimate_memory(GPTJ, RECIPE, sharding=away)
    assert offloaded.host - without.host == 28 * BLOCK // 8 * 4
    top = estimate_memory(GPTJ, RECIPE, sharding=sharding, train_blocks=2, reference="shared")
    assert top.reference == (2 * BLOCK // 8 + 8_192 + 206_488_800) * 4  # norm and head are whole


def test_a_copy_is_sampled_from() -> None:
    """In 2 bytes: what trains, and what is not stored so already; an adapter is merged."""
    half = Precision(weight=2, activation=2, exact=4)
    top = estimate_memory(GPTJ, RECIPE, half, train_blocks=2, sampled_bytes=2)
    assert top.rollout_copy == (2 * BLOCK + 8_192 + 206_488_800) * 2
    without = estimate_memory(GPTJ, RECIPE, half, train_blocks=2)
    assert (without.rollout_copy, top.peak - without.peak) == (0, top.rollout_copy)
    whole = estimate_memory(GPTJ, RECIPE, train_blocks=2, sampled_bytes=2)
    assert whole.rollout_copy == 6_050_882_784 * 2
    adapter = estimate_memory(GPTJ, RECIPE, half, lora_rank=8, train_blocks=3, sampled_bytes=2)
    assert adapter.rollout_copy == 3 * BLOCK * 2
    exact = estimate_memory(GPTJ, RECIPE, train_blocks=2, sampled_bytes=4)
    assert exact.rollout_copy == (2 * BLOCK + 8_192 + 206_488_800) * 4
    nothing = estimate_memory(GPTJ, replace(RECIPE, decoded_rows=0), sampled_bytes=2)
    assert nothing.rollout_copy == 0


# A model whose gradients fit into one bucket, and what DeepSpeed 0.19 was seen to hold for it in a
# step of two processes, tensor by tensor: all numbers are multiples of its size.
SMALL = Architecture("llama", 5, 640, 10, 1600, 512, 128)
STEP = Workload(rows=2, tokens=16, head_tokens=0)
COPIED = replace(FLOAT32, optimizer=12)


def copies(precision: Precision, workload: Workload, **sharding: bool) -> MemoryEstimate:
    return estimate_memory(
        SMALL, workload, precision, Sharding(2, optimizer=True, bucket=True, **sharding)
    )


def test_zero1_fills_its_bucket_from_whole_gradients() -> None:
    size = 4 * count_parameters(SMALL).total
    plan = copies(COPIED, STEP)
    # Weights, half of copy and moments; then all gradients and the bucket, without activations.
    assert plan.activations + plan.logits < size
    assert plan.peak == size + 3 * size // 2 + size + size


@pytest.mark.parametrize("accumulates", [False, True])
def test_zero2_reduces_a_copy_of_its_bucket(accumulates: bool) -> None:
    size = 4 * count_parameters(SMALL).total
    plan = copies(COPIED, replace(STEP, accumulates=accumulates), gradients=True)
    part = size // 2 if accumulates else 0
    assert plan.peak == size + 3 * size // 2 + part + size + size


def test_zero2_in_half_precision_adds_up_in_float32_at_once() -> None:
    half = 2 * count_parameters(SMALL).total
    plan = copies(HALF_WITH_MASTER, STEP, gradients=True)
    # Weights; half of a float32 copy and moments; the bucket, its copy, half of float32 gradients.
    assert plan.peak == half + 3 * half + half + half + half


@pytest.mark.parametrize("stage", [{}, {"gradients": True}])
@pytest.mark.parametrize("accumulates", [False, True])
def test_gpus_fill_a_second_bucket(stage: dict[str, bool], accumulates: bool) -> None:
    work = replace(STEP, accumulates=accumulates)
    one, two = (copies(COPIED, work, **stage, overlaps=overlaps) for overlaps in (False, True))
    assert two.gradients - one.gradients == count_parameters(SMALL).total * 4
    assert two.communication == one.communication


def test_zero3_fetches_through_a_buffer() -> None:
    size = 4 * count_parameters(SMALL).total
    plan = copies(COPIED, STEP, weights=True, keeps_gradients=True)
    held = size // 2 + 3 * size // 2 + size // 2 + size  # weights, optimizer, gradients, bucket
    assert plan.peak == held + size + size, "the weights, and the buffer in which they came"


def test_zero3_offloads_gradients_twice() -> None:
    size = 4 * count_parameters(SMALL).total
    plan = copies(COPIED, STEP, weights=True, keeps_gradients=True, offload=True)
    # On the host the weights, the optimizer's, gradients added up and gradients to be stepped.
    assert plan.host == size // 2 + 3 * size // 2 + size // 2 + size // 2
    assert plan.peak == size + size + size, "the bucket; the weights, and their buffer"


def test_rounded_weights_are_kept_exact_on_the_host() -> None:
    precision = replace(HALF_WITH_MASTER, exact=4)
    plan = estimate_memory(GPTJ, RECIPE, precision, train_blocks=2)
    frozen = 6_050_882_784 - (2 * 201_355_264 + 8_192 + 206_488_800)
    assert plan.host == frozen * 4


def test_buckets_of_gradients_stay_while_sampling() -> None:
    work = replace(RECIPE, decoded_rows=10_000)  # sampling takes the most
    kept = estimate_memory(GPTJ, work, sharding=Sharding(2, keeps_gradients=True))
    freed = estimate_memory(GPTJ, work, sharding=Sharding(2))
    assert kept.peak - freed.peak == 6_050_882_784 * 4


def test_offloaded_optimizer_is_in_host_memory() -> None:
    plan = estimate_memory(GPTJ, RECIPE, sharding=Sharding(offload=True), train_blocks=2)
    assert plan.optimizer == 0
    assert plan.host == (2 * 201_355_264 + 8_192 + 206_488_800) * 8


def test_adapter_alone_trains() -> None:
    plan = estimate_memory(GPTJ, RECIPE, lora_rank=8, reference="lora")
    # four 4096 x 4096 and 4096 <-> 16384: 8 * (4 * 8192 + 2 * 20480) = 589,824 a block
    assert plan.gradients == 28 * 589_824 * 4
    assert plan.reference == 0
    assert plan.weights == (6_050_882_784 + 28 * 589_824) * 4


def test_value_model_and_reward_model_are_counted() -> None:
    alone = estimate_memory(GPTJ, RECIPE)
    trunk = 6_050_882_784 - 206_488_800
    assert estimate_memory(GPTJ, RECIPE, reward_model=GPTJ).reward_model == trunk * 4
    half = replace(HALF_WITH_MASTER, beside=4)
    assert estimate_memory(GPTJ, RECIPE, half, reward_model=GPTJ).reward_model == trunk * 4
    both = estimate_memory(GPTJ, RECIPE, value_blocks=28)
    assert both.optimizer - alone.optimizer == trunk * 8
    assert both.activations > 1.9 * alone.activations
    top = estimate_memory(GPTJ, RECIPE, train_blocks=2)
    branch = estimate_memory(GPTJ, RECIPE, train_blocks=2, value_blocks=2)
    assert branch.weights - top.weights == 2 * 201_355_264 * 4
    assert branch.gradients - top.gradients == 2 * 201_355_264 * 4
    assert branch.activations > 1.9 * top.activations


def test_a_reward_model_over_the_policys_trunk_holds_its_own_blocks() -> None:
    whole = estimate_memory(GPTJ, RECIPE, train_blocks=2, reward_model=GPTJ)
    over = estimate_memory(GPTJ, RECIPE, train_blocks=2, reward_model=GPTJ, reward_blocks=2)
    # GPT-J has blocks of 201_355_264 parameters.
    assert over.reward_model == 2 * 201_355_264 * 4
    assert whole.reward_model > 13 * over.reward_model


def test_gradients_are_reduced_in_deepspeeds_buckets() -> None:
    assert BUCKET == deepspeed.BUCKET


def test_long_logits_are_made_in_chunks() -> None:
    assert LOGITS_CHUNK == logprobs.ACCELERATOR_CHUNK_LOGITS
    assert CHUNK_ROWS == logprobs.CHUNK_ROWS
    many = replace(RECIPE, rows=64, head_tokens=512)
    assert estimate_memory(GPTJ, many).logits == 2 * 4 * 4096 * 50400
    assert estimate_memory(replace(GPTJ, vocabulary=128256), many).logits == 2 * 4 * 2**28


@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_what_autograd_keeps(
    tiny: Build, family: str, tokens: int, attention: str
) -> None:
    model = tiny(family, context=256, width=64, ffn_width=256, head_width=16)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention)
    shape = Architecture(
        family,
        4,
        64,
        4,
        256,
        89,
        256,
        model.config.__dict__.get("num_key_value_heads"),
        head_width=16,
    )
    workload = Workload(2, tokens, 0, fused_attention=attention == "sdpa")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(torch.zeros(2, tokens, dtype=torch.int64), use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    expected = 4 * block_activations(shape, workload, FLOAT32)
    assert 0.95 < measured / expected < 1.26


def test_checkpointing_keeps_one_block_and_the_inputs_of_all() -> None:
    kept = estimate_memory(GPTJ, RECIPE).activations
    again = estimate_memory(GPTJ, replace(RECIPE, gradient_checkpointing=True)).activations
    states = 4 * 512 * 4096 * 4
    block = (kept - states) // 28
    assert again == 28 * states + block + states


def test_plan_needs_no_torch() -> None:
    code = "import sys, rlhf_exp.models.memory_estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
