"""Weights that are divided as they are loaded: one process has them, the others take their parts.

Two processes in one start; what they must find is computed by one process alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from rlhf_exp.config.training import PpoConfig
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm, load_causal_lm
from rlhf_exp.models.reference import Reference, build_reference
from rlhf_exp.training.optim import build_optimizer

SHAPE = Architecture(
    type="gpt_neox", layers=3, width=16, heads=2, ffn_width=32, vocabulary=40, context=16
)
ROWS = {
    "tokens": torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 0]]),
    "prompt_lengths": torch.tensor([2, 1]),
    "response_lengths": torch.tensor([4, 3]),
}
PARTS = torch.tensor([[0, 1]]).T
"""The row of each of two processes."""


def policy_of(folder: Path, weights: bool) -> Policy:
    return Policy(load_causal_lm(folder, weights=weights), seed=3, run_all_positions=True)


def logprobs(model: Reference | Policy, rows: Tensor) -> Tensor:
    batch: dict[str, Any] = {name: value[rows] for name, value in ROWS.items()}
    return model.logprobs(**batch, temperature=1.0, width=4)


def step(world: World, policy: Policy, rows: Tensor) -> None:
    """Train one step on the rows of all processes."""
    section = PpoConfig(lr=0.01)
    wrapped = world.prepare(policy, lambda: build_optimizer(policy, section), 1.0)
    for part in world.micro_batches([rows]):
        batch = {name: value[part] for name, value in ROWS.items()}
        outputs = wrapped(**batch, temperature=1.0, width=4)
        world.backward((outputs.logprobs.sum() + outputs.values.square().sum()) / 8)
    world.strategy.step()


def streamed(world: World) -> dict[str, Tensor]:
    found = world.strategy.stream_weights(torch.bfloat16)
    return {name: value.clone() for name, value in found}


def one_process(rank: int, folder: Path, strategy: str) -> None:
    """Write down what a process saw."""
    store = distributed.FileStore(str(folder / f"store-{strategy}"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    seen: dict[str, Any] = {}
    with world_of("float32", threads=1, strategy=strategy) as world:
        policy = policy_of(folder / "model", world.has_weights)
        seen["loaded"] = not next(policy.model.parameters()).is_meta
        reference = build_reference(policy, place=world.place)
        model: nn.Module = reference._model  # type: ignore[attr-defined]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        seen["held"] = sum(p.numel() for p in local)
        seen["reference"] = logprobs(reference, PARTS[rank])
        step(world, policy, PARTS[rank])
        seen["streamed"] = streamed(world)
        with world.gathered():
            seen["streamed gathered"] = streamed(world)
            seen["policy"] = logprobs(policy, torch.arange(2))
        seen["reference after"] = logprobs(reference, PARTS[rank])
        world.release(everywhere=False)
        seen["released"] = {
            name: None if p.is_meta else p.detach() for name, p in policy.named_parameters()
        }
    torch.save(seen, folder / f"{strategy}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dividing")
    torch.set_num_threads(1)
    build_causal_lm(SHAPE, seed=1).save_pretrained(folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_process_without_weights_takes_its_part(
    folder: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    spawn(one_process, (folder, strategy), nprocs=2)
    first, second = (torch.load(folder / f"{strategy}-{rank}.pt") for rank in range(2))
    assert [first["loaded"], second["loaded"]] == [True, False]
    alone = policy_of(folder / "model", True)
    count = sum(p.numel() for p in alone.model.parameters())
    blocks = sum(p.numel() for p in alone.model.gpt_neox.layers.parameters())
    with torch.no_grad():
        before = logprobs(alone, torch.arange(2))
    for rank, seen in enumerate((first, second)):
        assert seen["held"] == count - blocks // 2, "half of the blocks, and all that is none"
        assert torch.equal(seen["reference"], before[rank : rank + 1])
        assert torch.equal(seen["reference after"], seen["reference"]), "it does not train"
    with world_of("float32", threads=1) as world, torch.random.fork_rng():
        step(world, alone, torch.arange(2))
        with torch.no_grad():
            after = logprobs(alone, torch.arange(2))
    assert (after - before).abs().max() > 1e-2, "the step has moved the policy"
    for seen in (first, second):
        assert torch.allclose(seen["policy"], after, atol=1e-6)
        for kind in ("streamed", "streamed gathered"):
            assert seen[kind].keys() == first["released"].keys()
            for name, value in seen[kind].items():
                assert torch.equal(value, first["released"][name].bfloat16()), (kind, name)
    assert set(second["released"].values()) == {None}
    for name, value in alone.named_parameters():
        # AdamW makes a full step of a gradient that is nothing but rounding.
        apart = (first["released"][name] - value).abs() > 1e-6
        assert apart.float().mean() < (0.5 if name.endswith("query_key_value.bias") else 0.02), name
