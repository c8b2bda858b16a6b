from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from rlhf_exp.batch import Prompts
from rlhf_exp.distributed.redistribute import redistribute
from rlhf_exp.distributed.world import world_of

SHARES = np.array([[5, 0], [3, 7], [1, 5]])
"""Of nine rows in three processes: 0 to 2, 3 to 5, 6 to 8. One row goes to two of them."""


def one_process(rank: int, folder: Path) -> None:
    """Write what a process gets of `SHARES`."""
    store = distributed.FileStore(str(folder / "store"), 3)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
    numbers = torch.arange(rank * 3, rank * 3 + 3)
    batch = Prompts(numbers[:, None].repeat(1, 2), numbers + 10, numbers > 4, numbers.float())
    with world_of("float32", threads=1, strategy="ddp") as world:
        found = redistribute(batch, SHARES, world)
    torch.save([found.tokens, found.lengths, found.index, found.rollout], folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_each_process_gets_its_share_of_any_rows(tmp_path: Path) -> None:
    spawn(one_process, (tmp_path,), nprocs=3)
    for rank, expected in enumerate([[5, 0], [3, 7], [1, 5]]):
        tokens, lengths, index, rollout = torch.load(tmp_path / f"{rank}.pt")
        assert tokens.tolist() == [[number, number] for number in expected]
        assert lengths.tolist() == [number + 10 for number in expected]
        assert index.tolist() == [number > 4 for number in expected]
        assert rollout.tolist() == [float(number) for number in expected]


def test_one_process_selects() -> None:
    numbers = torch.arange(8)
    batch = Prompts(numbers[:, None], numbers, numbers, numbers)
    with world_of("float32", threads=1) as world:
        assert redistribute(batch, SHARES[:1], world).lengths.tolist() == [5, 0]
