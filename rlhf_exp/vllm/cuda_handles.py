"""Tensors on a GPU as handles, by which another process of the machine reads them where they are.

These are CUDA's handles of memory, as `torch.multiprocessing` makes them, in JSON. The tensors must
be kept until the other process is done. The counterpart is `rebuilt` in `worker/vllm_worker.py`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

Named = tuple[str, Tensor]


def handle_of(name: str, tensor: Tensor) -> dict[str, Any]:
    """Return a contiguous tensor's name and what `rebuild_cuda_tensor` needs, but for the device.

    Bytes are told apart from texts by the key that they stand under.
    """
    _, arguments = reduce_tensor(tensor)
    # The classes of tensor and storage are the other process's to choose.
    _, size, stride, offset, _, dtype, _, *memory = arguments
    encoded = [
        {"base64": b64encode(value).decode()} if isinstance(value, bytes) else value
        for value in memory
    ]
    return {
        "name": name,
        "size": list(size),
        "stride": list(stride),
        "offset": offset,
        "dtype": str(dtype).removeprefix("torch."),
        "memory": encoded,
    }


def chunks(tensors: Iterable[Named], most_bytes: int) -> Iterator[list[Named]]:
    """Yield tensors in groups of so many bytes at most, or of one tensor."""
    group: list[Named] = []
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if group and held + size > most_bytes:
            yield group
            group, held = [], 0
        group.append((name, tensor))
        held += size
    if group:
        yield group
