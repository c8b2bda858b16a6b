from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.errors import UserError


def failing(world: World) -> str:
    if world.rank == 1:
        raise UserError("the disk is full")
    return "written"


def one_process(rank: int, folder: Path) -> None:
    """Write down what a process saw."""
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    seen: dict[str, object] = {}
    with world_of("float32", threads=1, strategy="ddp") as world:
        try:
            world.run_on_all(lambda: failing(world))
        except Exception as error:
            seen["failure"] = f"{type(error).__name__}: {error}"
        seen["together"] = world.run_on_all(lambda: rank)
        seen["agreed"] = world.broadcast_object(rank)
        seen["any"] = [world.any(rank == 1), world.any(False)]
        seen["gathered"] = world.gather(torch.arange(rank + 1)).tolist()
        seen["sum"] = world.sum(torch.tensor([1.0, rank])).tolist()
        share = world.share(3)
        seen["share"] = [share.rows.tolist(), share.weights.tolist()]
    try:
        with world_of("float32", threads=1):
            pass
    except UserError as error:
        seen["single"] = str(error)
    torch.save(seen, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_what_processes_say_to_each_other(tmp_path: Path) -> None:
    spawn(one_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # Neither waits for the other: both know.
    assert first["failure"] == "FailedElsewhere: process 1 failed: the disk is full"
    assert second["failure"] == "UserError: the disk is full"
    assert first["share"] == [[0, 1], [1.0, 1.0]]
    assert second["share"] == [[2, 0], [1.0, 0.0]]
    for seen in (first, second):
        assert seen["together"] == [0, 1]
        assert seen["agreed"] == 0
        assert seen["any"] == [True, False]
        assert seen["gathered"] == [0, 0, 1]
        assert seen["sum"] == [2.0, 1.0]
        assert "single has one process, and 2 were started" in seen["single"]


def test_a_strategy_needs_processes() -> None:
    with (
        pytest.raises(UserError, match="no processes were started"),
        world_of("float32", strategy="ddp"),
    ):
        pass
