"""Weights that are divided as they are loaded: one process has them, the others take their parts.

What several processes must find is computed by one process alone.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from rlhf_exp.config.training import PpoConfig
from rlhf_exp.distributed.strategy import OptimizerState
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
PROCESSES = {"fsdp": 2, "node": 4, "zero3": 2}
"""Strategies; `node` is FSDP over two machines of two processes."""


def policy_of(folder: Path, weights: bool) -> Policy:
    return Policy(load_causal_lm(folder, weights=weights), seed=3, run_all_positions=True)


def logprobs(model: Reference | Policy, rows: Tensor) -> Tensor:
    batch: dict[str, Any] = {name: value[rows] for name, value in ROWS.items()}
    return model.logprobs(**batch, temperature=1.0, width=4)


def begin(world: World, policy: Policy) -> nn.Module:
    return world.prepare(policy, lambda: build_optimizer(policy, PpoConfig(lr=0.01)), 1.0)


def step(world: World, wrapped: nn.Module, rows: Tensor) -> None:
    """Train one step on the rows of all processes, each of which may be there several times."""
    for part in world.micro_batches([rows]):
        batch = {name: value[part] for name, value in ROWS.items()}
        outputs = wrapped(**batch, temperature=1.0, width=4)
        loss = outputs.logprobs.sum() + outputs.values.square().sum()
        world.backward(loss / (4 * len(rows) * world.processes))
    world.strategy.step()


def whole(world: World, policy: Policy) -> dict[str, Tensor]:
    with world.gathered():
        return {name: value.detach().clone() for name, value in policy.named_parameters()}


def one_process(rank: int, folder: Path, kind: str) -> None:
    """Write down what a process saw."""
    processes = PROCESSES[kind]
    nodes = 2 if kind == "node" else 1
    local = processes // nodes
    os.environ |= {"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
    store = distributed.FileStore(str(folder / f"store-{kind}"), processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    seen: dict[str, Any] = {}
    strategy, over = ("fsdp", "node") if kind == "node" else (kind, "all")
    own = torch.tensor([rank % 2])
    with world_of("float32", threads=1, strategy=strategy, shard_over=over) as world:
        policy = policy_of(folder / "model", world.has_weights)
        seen["loaded"] = not next(policy.model.parameters()).is_meta
        reference = build_reference(policy, place=world.place)
        model: nn.Module = reference._model  # type: ignore[attr-defined]
        local_parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        seen["held"] = sum(p.numel() for p in local_parts)
        seen["reference"] = logprobs(reference, own)
        wrapped = begin(world, policy)
        step(world, wrapped, own)
        seen["gathered"] = whole(world, policy)
        with world.gathered():
            seen["policy"] = logprobs(policy, torch.arange(2))
        seen["reference after"] = logprobs(reference, own)
        weights = world.broadcast_object(world.strategy.weights())
        states = world.all_gather_object(world.strategy.state())
        seen["checkpoint"] = (world.strategy.layout, weights, states)
        world.resume(weights, saved(*seen["checkpoint"]))  # where nothing has changed
        for _ in range(2):
            step(world, wrapped, own)
            seen["second"] = [*seen.get("second", []), whole(world, policy)]
            world.resume(weights, saved(*seen["checkpoint"]))
        world.release(everywhere=False)
        seen["released"] = {
            name: None if p.is_meta else p.detach() for name, p in policy.named_parameters()
        }
    torch.save(seen, folder / f"{kind}-{rank}.pt")
    distributed.destroy_process_group()


def saved(layout: str, weights: dict[str, Tensor], states: list[dict[str, Any]]) -> OptimizerState:
    return OptimizerState(layout, len(states), lambda rank: copy.deepcopy(states[rank]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dividing")
    torch.set_num_threads(1)
    build_causal_lm(SHAPE, seed=1).save_pretrained(folder / "model")
    return folder


def nearly_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float) -> bool:
    """AdamW makes a full step of a gradient that is nothing but rounding, as a key's bias has."""
    apart = [(ours[name] - value).abs() > limit for name, value in theirs.items()]
    return torch.cat([part.flatten() for part in apart]).float().mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSES)
def test_a_process_without_weights_takes_its_part(folder: Path, kind: str) -> None:
    spawn(one_process, (folder, kind), nprocs=PROCESSES[kind])
    files = [folder / f"{kind}-{rank}.pt" for rank in range(PROCESSES[kind])]
    first, *others = (torch.load(file) for file in files)
    assert first["loaded"]
    assert not any(seen["loaded"] for seen in others)
    alone = policy_of(folder / "model", True)
    count = sum(p.numel() for p in alone.model.parameters())
    blocks = sum(p.numel() for p in alone.model.gpt_neox.layers.parameters())
    with torch.no_grad():
        before = logprobs(alone, torch.arange(2))
    for rank, seen in enumerate((first, *others)):
        assert seen["held"] == count - blocks // 2, "half of the blocks, and all that is none"
        assert torch.equal(seen["reference"], before[[rank % 2]])
        assert torch.equal(seen["reference after"], seen["reference"]), "it does not train"
    with world_of("float32", threads=1) as world, torch.random.fork_rng():
        wrapped = begin(world, alone)
        step(world, wrapped, torch.arange(2))
        with torch.no_grad():
            after = logprobs(alone, torch.arange(2))
        trained = {name: p.detach().clone() for name, p in alone.named_parameters()}
        step(world, wrapped, torch.arange(2))
        second = whole(world, alone)
        if kind != "zero3":  # which only ZeRO 3 can read
            layout, weights, states = first["checkpoint"]
            world.resume(weights, saved(layout, weights, states))
            step(world, wrapped, torch.arange(2))
            again = whole(world, alone)
            assert nearly_equal(again, second, 1e-5), "one process goes on from it"
            written = [bool(state["parameters"]) for state in states]
            assert written == [True, True, False, False][: len(states)], "one copy of it"
    assert (after - before).abs().max() > 1e-2, "the step has moved the policy"
    for seen in (first, *others):
        assert torch.allclose(seen["policy"], after, atol=1e-6)
        assert nearly_equal(seen["second"][0], second, 1e-5)
        for name, value in seen["second"][0].items():
            assert torch.equal(value, seen["second"][1][name]), "resumed, it is the same step"
        for name, value in seen["gathered"].items():
            assert torch.equal(value, first["released"][name]), name
        assert seen["gathered"].keys() == first["released"].keys()
    assert all(set(seen["released"].values()) == {None} for seen in others)
    assert nearly_equal(first["released"], trained, 1e-6)
