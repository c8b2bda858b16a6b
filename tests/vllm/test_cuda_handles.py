"""Weights from GPU to GPU, without one: what goes into a handle comes out of it again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.vllm import cuda_handles
from rlhf_exp.vllm import server as server_module
from rlhf_exp.vllm.cuda_handles import chunks, handle_of
from rlhf_exp.vllm.server import LocalServer
from rlhf_exp.vllm.worker import vllm_worker
from tests.vllm.stand_in import StandInLLM, StandInServer, stand_in_servers
from tests.vllm.test_engine import a_policy, a_request, change, engine_over, gap, some_prompts


@pytest.fixture
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def test_a_handle_holds_all_but_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = (b"\x00handle", 4096, 512, False, b"counter\xff", 7, b"event", True)
    where = (torch.Size([2, 3]), (3, 1), 5)
    told = (torch.Tensor, *where, torch.storage.TypedStorage, torch.bfloat16, 3, *memory)
    monkeypatch.setattr(cuda_handles, "reduce_tensor", lambda tensor: (None, told))
    handle = json.loads(json.dumps(handle_of("weight", torch.zeros(1))))
    got: list[Any] = []
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *found: got.extend(found))
    name, _ = vllm_worker.rebuilt(handle, device=1)
    assert name == "weight"
    assert got == [torch.Tensor, *where, torch.UntypedStorage, torch.bfloat16, 1, *memory]


def test_chunks_have_so_many_bytes_at_most() -> None:
    tensors = [(str(n), torch.zeros(size)) for n, size in enumerate((3, 2, 9, 1, 1))]
    groups = [[name for name, _ in group] for group in chunks(tensors, most_bytes=20)]
    # 12 + 8 bytes; 36 alone are more than 20; 4 + 4.
    assert groups == [["0", "1"], ["2"], ["3", "4"]]


class DirectServer(LocalServer):
    """A server whose tensors go through a table in this process instead of a GPU's memory."""

    def __init__(self, stand_in: StandInServer) -> None:
        self.name, self.died, self.restarts = "vLLM", 0, 0
        self._trainer_gpu, self._key = 0, ""
        self._port = int(stand_in.url.rpartition(":")[2])
        self._stand_in = stand_in
        stand_in.worker.private = True

    def start(self) -> None: ...

    def close(self, owner: str) -> None:
        pass

    def _connect(self) -> None: ...

    def _gone(self, reason: str) -> str:
        return reason

    def restart(self, reason: Exception) -> None:
        self.restarts += 1
        self._stand_in.forget()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Stands for the GPU's memory."""
    found: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> dict[str, str]:
        found[name] = tensor.clone()
        return {"name": name}

    monkeypatch.setattr(server_module, "handle_of", put)
    monkeypatch.setattr(server_module, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(
        vllm_worker, "rebuilt", lambda one, device: (one["name"], found[one["name"]])
    )
    stream = type("Stream", (), {"synchronize": lambda self: None})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    return found


def test_weights_go_from_gpu_to_gpu(world: World, table: dict[str, Tensor]) -> None:
    policy = a_policy()
    with (
        stand_in_servers(1) as stand_ins,
        engine_over([DirectServer(stand_ins[0])], policy, world) as engine,
    ):
        engine.refresh(0)
        assert not table, "the first ones come with the model"
        change(policy)
        engine.refresh(1)
        assert set(table) == set(policy.model.state_dict())
        assert StandInLLM.updates > 3, "in parts"
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-4


def test_where_that_fails_weights_go_by_a_file(
    world: World, table: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    policy = a_policy()
    with (
        stand_in_servers(1, "fails") as stand_ins,
        engine_over([server := DirectServer(stand_ins[0])], policy, world) as engine,
    ):
        engine.refresh(0)
        change(policy)
        with caplog.at_level(logging.WARNING):
            engine.refresh(1)
        assert "no longer go to vLLM from GPU to GPU, but by a file: RuntimeError" in caplog.text
        assert server.restarts == 1
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-4
        table.clear()
        change(policy)
        engine.refresh(2)
        assert not table
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-4


def test_wrong_memory_is_noticed_and_a_file_taken(
    world: World, table: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        vllm_worker, "rebuilt", lambda one, device: (one["name"], 0 * table[one["name"]])
    )
    policy = a_policy()
    with (
        stand_in_servers(1) as stand_ins,
        engine_over([server := DirectServer(stand_ins[0])], policy, world) as engine,
    ):
        engine.refresh(0)
        change(policy)
        engine.refresh(1)
        assert server.restarts == 1
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-4
