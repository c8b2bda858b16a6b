"""A pretended CUDA: tensors that say they are on a GPU, and compute on the CPU.

It finds what a machine without a GPU would never show: an operation that mixes devices raises, and
kernels, waits of the host and uploads are counted, with the lines that cause them. It says nothing
about real kernels, their numbers or their speed, nor about NCCL.

`install` changes torch for the whole process: use it in a process of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, SimpleNamespace
from typing import Any

from tests.pretended_cuda.guard import load_guard

load_guard()  # before torch looks for devices

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICES = 8
"""GPUs that there are said to be, as in `guard.cpp`."""

CPU_INDEX_ALLOWED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy"}
"""Operations that take tensors of several devices: an index may be on the CPU (it is uploaded)."""

NO_KERNEL = {
    *("detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided"),
    *("new_empty_strided", "_local_scalar_dense", "set_", "is_same_size", "is_pinned"),
    *("_pin_memory", "_fused_sdp_choice"),
}
"""Operations that run nothing on the device; so do views."""

SIZES_ON_HOST = {
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("is_nonzero", "repeat_interleave", "bincount"),
}
"""Operations whose result, or its size, the host waits for."""

EFFICIENT_ATTENTION = 2
"""Of `_fused_sdp_choice`: the kernel that takes masks."""


Counts = dict[str, int]
"""`kernels`, `launches`, `syncs`, `uploads`: see `Tally`."""


class Tally:
    """What was counted since the last `clear`.

    Attributes:
        kernels: kernels that ran, by operation.
        launches: by the host: of kernels, and of whole graphs.
        syncs: waits of the host for the device, by what and source line: reads of values, sizes
            that depend on values, and uploads from memory that is not pinned.
        uploads: copies from the host to the device, by source line.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start afresh."""
        self.kernels: Counter[str] = Counter()
        self.launches = 0
        self.syncs: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def counts(self) -> Counts:
        """Return the sums."""
        return {
            "kernels": self.kernels.total(),
            "launches": self.launches,
            "syncs": self.syncs.total(),
            "uploads": self.uploads.total(),
        }

    def sync(self, what: str) -> None:
        """Count a wait of the host."""
        if PretendedGraph.recording is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        self.syncs[f"{what} at {source_line()}"] += 1

    def upload(self, pinned: bool) -> None:
        """Count a copy to the device, which is a wait as well if its source is not pinned."""
        self.uploads[source_line()] += 1
        if not pinned:
            self.sync("upload")


TALLY = Tally()


def source_line() -> str:
    """Return the line of `rlhf_exp` that is being run, or else of a library below it."""
    found: dict[str, str] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for part in _SOURCES:
            if part not in found and part in frame.f_code.co_filename:
                file = frame.f_code.co_filename.rpartition(part)[2]
                found[part] = f"{file}:{frame.f_lineno}"
        if _SOURCES[0] in found:
            break
        frame = frame.f_back
    return next((found[part] for part in _SOURCES if part in found), "unknown")


_SOURCES = ("/rlhf_exp/", "/transformers/", "/torch/optim/", "/torch/nn/")


class PretendedTensor(torch.Tensor):
    """A tensor said to be on a GPU.

    Attributes:
        inner: its values, on the CPU.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls: Any, inner: Tensor, index: int = 0) -> Any:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"cuda:{index}",
        )
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        TALLY.sync("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def storage(self) -> Any:
        return self.inner.storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            copied: Any = PretendedTensor(self.inner.detach().clone(), self.device.index)
        if isinstance(self, torch.nn.Parameter) or getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    @property
    def data(self) -> Any:
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, value: Any) -> None:
        torch._C.TensorBase.data.__set__(self, value)
        self.inner = value.inner


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch on the inner tensors; check devices, and count."""
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not on_gpu and (asked is None or asked.type != "cuda"):
        if kwargs.get("pin_memory"):
            return _said_to_be_pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)
    _check_devices(name, args, tensors, on_gpu)
    to_gpu = bool(on_gpu) if asked is None else asked.type == "cuda"
    index = on_gpu[0].device.index if on_gpu else 0
    inner_kwargs = tree_map(_inner, kwargs)
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
        index = index if asked.index is None else asked.index
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    _count(func, name, args, kwargs, bool(on_gpu), to_gpu)
    inner_args = tree_map(_inner, args)
    if PretendedGraph.recording is None:
        out = _compute(func, name, inner_args, inner_kwargs)
    else:
        out = PretendedGraph.recording.note(func, name, inner_args, inner_kwargs)
    if not to_gpu:
        return out
    return _wrapped(func, name, args, kwargs, out, index)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendedTensor) else value


def _check_devices(
    name: str, args: tuple[Any, ...], tensors: list[Any], on_gpu: list[PretendedTensor]
) -> None:
    if name in COPIES or not on_gpu:
        return
    if len({tensor.device.index for tensor in on_gpu}) > 1:
        raise RuntimeError(f"{name}: tensors of different GPUs at {source_line()}")
    if name in CPU_INDEX_ALLOWED:
        if not isinstance(args[0], PretendedTensor):
            raise RuntimeError(f"{name}: a CPU tensor with an index on a GPU at {source_line()}")
        return
    # A number in a tensor of no dimension may be anywhere.
    others = [t for t in tensors if not isinstance(t, PretendedTensor) and t.ndim and t.numel()]
    if others:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(f"{name}: CPU tensors {shapes} with GPU tensors at {source_line()}")


def _count(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    from_gpu: bool,
    to_gpu: bool,
) -> None:
    if name == "_local_scalar_dense":
        TALLY.sync("read")
    elif name in SIZES_ON_HOST:
        TALLY.sync(name)
    elif name == "_to_copy" and from_gpu and not to_gpu:
        TALLY.sync("read")
    elif name == "_to_copy" and to_gpu and not from_gpu:
        TALLY.upload(_is_pinned(args[0]) and bool(kwargs.get("non_blocking")))
    elif name == "copy_":
        target, source = args[:2]
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if isinstance(target, PretendedTensor) and not isinstance(source, PretendedTensor):
            if source.ndim or source.numel() > 1:
                TALLY.upload(_is_pinned(source) and not waits)
        elif not isinstance(target, PretendedTensor) and (waits or not _is_pinned(target)):
            TALLY.sync("read")
    elif name in CPU_INDEX_ALLOWED:
        indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            TALLY.sync("boolean index")
        if any(not isinstance(index, PretendedTensor) for index in indices):
            TALLY.upload(pinned=False)
    if not func.is_view and name not in NO_KERNEL:
        if PretendedGraph.recording is not None:
            PretendedGraph.recording.kernels[name] += 1
            return
        TALLY.kernels[name] += 1
        TALLY.launches += 1


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "said_to_be_pinned", False)


def _compute(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU, where it has no such kernel by one that does the same."""
    if name == "_fused_sdp_choice":
        return EFFICIENT_ATTENTION
    if name == "_scaled_dot_product_efficient_attention":
        query, key, value, bias = args[:4]
        causal = bool(kwargs.get("is_causal", args[6] if len(args) > 6 else False))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, bias, is_causal=causal, scale=kwargs.get("scale")
        )
        nothing = torch.zeros((), dtype=torch.int64)
        return attended, torch.zeros(query.shape[:3]), nothing, nothing
    if name == "mm" and len(args) == 3:  # torch.mm(..., out_dtype=)
        return args[0].to(args[2]) @ args[1].to(args[2])
    if name == "addmm" and "dtype" in func._overloadname:
        bias, left, right, dtype = args[:4]
        product = left.to(dtype) @ right.to(dtype)
        total = kwargs.get("beta", 1) * bias.to(dtype) + kwargs.get("alpha", 1) * product
        out = kwargs.get("out")
        return total if out is None else out.copy_(total)
    return func(*args, **kwargs)


def _wrapped(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, index: int
) -> Any:
    """Return the result as pretended tensors: the same ones where the operation writes in place."""

    def wrap(value: Any) -> Any:
        return PretendedTensor(value, index) if isinstance(value, torch.Tensor) else value

    schema = func._schema
    written = [
        number
        for number, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written:
        if not schema.returns:
            return None
        if name in ("resize_", "set_"):
            raise NotImplementedError(name)
        number = written[0]
        target = args[number] if number < len(args) else kwargs[schema.arguments[number].name]
        if len(schema.returns) == 1 and isinstance(target, torch.Tensor):
            return target
        return tree_map(wrap, out)
    out = tree_map(wrap, out)
    if func.is_view:
        try:
            return return_and_correct_aliasing(func, args, kwargs, out)
        except (AssertionError, RuntimeError):
            return out
    return out


class PretendedGraph:
    """Stands in for `torch.cuda.CUDAGraph`: operations are noted, and done again by `replay`.

    Recording does nothing, as on a GPU: what it writes meanwhile is taken back in the end.
    """

    recording: PretendedGraph | None = None

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self._noted: list[tuple[Any, str, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._overwritten: dict[int, tuple[Any, Any]] = {}

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        PretendedGraph.recording = self

    def capture_end(self) -> None:
        PretendedGraph.recording = None
        for storage, before in self._overwritten.values():
            storage.copy_(before)

    def note(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Do an operation, and note it with its tensors, which later replays read and write."""
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                target = args[number] if number < len(args) else kwargs[argument.name]
                storage = target.untyped_storage()
                if storage.data_ptr() not in self._made | self._overwritten.keys():
                    self._overwritten[storage.data_ptr()] = storage, storage.clone()
        out = _compute(func, name, args, kwargs)
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in _tensors(out)} - given
        self._noted.append((func, name, args, kwargs, out))
        return out

    def replay(self) -> None:
        TALLY.launches += 1
        TALLY.kernels.update(self.kernels)
        for func, name, args, kwargs, out in self._noted:
            again = _compute(func, name, args, kwargs)
            for new, recorded in zip(_tensors(again), _tensors(out), strict=True):
                if new.data_ptr() != recorded.data_ptr():
                    recorded.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class PretendedEvent:
    """Stands in for `torch.cuda.Event`."""

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        TALLY.sync("event")


class PretendedStream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass


class _Dispatch(TorchDispatchMode):
    """Takes operations whose only sign of a GPU is their `device` argument."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """Has `torch.tensor(..., device=GPU)` make its values on the CPU first, as torch does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        makes = func in (torch.tensor, torch.as_tensor)
        if not makes or device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        if args and isinstance(args[0], torch.Tensor):
            return args[0].to(device=device, dtype=kwargs.get("dtype", args[0].dtype))
        return func(*args, **kwargs).to(device)


@contextmanager
def pretending() -> Iterator[Tally]:
    """Compute on pretended GPUs while the context lasts; yield what is counted."""
    with _Dispatch(), _Constructors():
        yield TALLY


def install() -> None:
    """Make torch say in this process that it has GPUs."""
    properties = SimpleNamespace(
        total_memory=141 << 30, multi_processor_count=132, major=9, minor=0, name="pretended GPU"
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": DEVICES,
        "set_device": None,
        "current_device": 0,
        "is_initialized": False,
        "_lazy_init": None,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "synchronize": None,
        "empty_cache": None,
        "graph_pool_handle": (0, 1),
        "current_stream": PretendedStream(),
        "stream": nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _answering(answer))
    torch.cuda.CUDAGraph = PretendedGraph  # type: ignore[misc, assignment]
    torch.cuda.Event = PretendedEvent  # type: ignore[misc, assignment]
    torch.cuda.Stream = PretendedStream  # type: ignore[misc, assignment]
    torch.cuda.amp.common.amp_definitely_not_available = _answering(False)
    torch.autograd.set_multithreading_enabled(False)
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    def inference_mode(mode: bool = True) -> AbstractContextManager[Any]:
        # Inference tensors and wrappers do not go together.
        return torch.no_grad() if mode else nullcontext()

    torch.inference_mode = inference_mode  # type: ignore[assignment, misc]
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[assignment]
    move = torch.nn.Module.to
    torch.nn.Module.to = _module_to(move)  # type: ignore[assignment, method-assign]


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _pin_memory(tensor: Tensor, *args: Any) -> Tensor:
    return _said_to_be_pinned(tensor.clone())


def _said_to_be_pinned(tensor: Tensor) -> Tensor:
    tensor.said_to_be_pinned = True  # type: ignore[attr-defined]
    return tensor


def _module_to(move: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Module.to`, which leaves a module alone that is where it shall be."""

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device", args[0] if args else None)
        parameters = list(self.parameters())
        if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
            wanted = torch.device(device).index or 0
            there = [
                isinstance(p, PretendedTensor) and p.device.index == wanted for p in parameters
            ]
            if parameters and all(there):
                return self
        return move(self, *args, **kwargs)

    return to
