"""The process group of one stage, made when it begins and destroyed when it is done.

No group lasts longer, so nothing waits inside a collective while a lease, a lock or a person is
waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rlhf_exp.distributed.exit import note_group
from rlhf_exp.distributed.lines import JOIN_S
from rlhf_exp.distributed.place import Place
from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

COLLECTIVE_S = 3600.0
"""How long a collective waits. Deaths are noticed without it; rank 0 alone may write for long."""


def open_store(place: Place) -> Store:
    """Return the store that all processes of a run share.

    torchrun's agent hosts it; elsewhere rank 0 does, at the port of its place.

    Raises:
        UserError: It cannot be reached, or the port is taken.
    """
    from torch.distributed import DistError, rendezvous

    place.export()
    try:
        found = rendezvous("env://", place.rank, place.processes, timeout=timedelta(seconds=JOIN_S))
        store: Store = next(found)[0]
    except DistError as error:
        raise UserError(
            f"rank {place.rank} cannot meet the others at {place.address}:{place.port}: {error}. "
            "All processes must run the same command, reach that machine, and find the port free"
        ) from error
    return store


@contextmanager
def process_group(store: Store, number: int, place: Place) -> Iterator[None]:
    """Be in torch's default process group while entered.

    Args:
        store: What all processes share.
        number: Differs from one group to the next.
        place: This process's.

    Raises:
        UserError: There are fewer devices than processes.
    """
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{place.local_processes} processes on this machine need as many GPUs, and it has "
                f"{torch.cuda.device_count()}; set distributed.processes to what there is"
            )
        torch.cuda.set_device(place.local_rank)
    note_group()
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(f"stage-{number}", store),
        rank=place.rank,
        world_size=place.processes,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    yield
    # Not after an error: others may be gone, and this process is about to leave, too.
    distributed.destroy_process_group()
