"""A GPU that the host pretends to be, so that a machine without one can test how code uses it.

Inside :func:`pretended`, torch believes that there is one GPU. Its tensors compute on the host and say ``cuda:0``. They
follow the rules of a real GPU that matter to the code that uses one:

- An operation refuses a tensor of the host beside one of the GPU.
- What makes the host wait for the GPU is recorded with its place, and raises under ``torch.cuda.set_sync_debug_mode``.
- The work of a second stream must be waited for before other work goes on.
- A copy to the host that nobody has waited for holds nonsense.
- The source of a copy to the GPU must not change before the GPU was waited for.

It says nothing of kernels, memory, speed, captured graphs, TF32 or several GPUs. Autocast rounds as on the host. Work
of the usual stream that a second stream reads too early is not noticed, and neither is memory that is used again early.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

GPU = torch.device("cuda", 0)
group_by_device = torch._C._group_tensors_by_device_and_dtype
ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / name) for name in ("ddil_core", "ddil_eval"))


class GpuTensor(Tensor):
    """A tensor that lies on the pretended GPU. Outside ``pretended`` it is one of the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (gpu := PretendedGpu.current) is not None:
            return gpu.call(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def on_gpu(value: object) -> bool:
    return isinstance(value, GpuTensor)


def to_gpu(tensor: Tensor) -> Tensor:
    """Return the tensor as one of the GPU, with the same memory and gradient."""
    if on_gpu(tensor):
        return tensor
    if tensor.requires_grad and tensor.is_leaf:
        return tensor.detach().as_subclass(GpuTensor).requires_grad_()
    return tensor.as_subclass(GpuTensor)


def to_host(tensor: Tensor) -> Tensor:
    """Return the tensor as one of the host, with the same memory and gradient."""
    return tensor.as_subclass(Tensor) if on_gpu(tensor) else tensor


WAITS = {
    *(getattr(Tensor, name) for name in (
        "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero", "unique",
        "equal", "allclose", "masked_select", "is_nonzero",
    )),
    torch.nonzero, torch.unique, torch.equal, torch.allclose, torch.masked_select, torch.is_nonzero,
    torch.linalg.eigh, torch.linalg.eigvalsh, torch.linalg.cholesky, torch.linalg.inv, torch.linalg.solve,
    torch.linalg.svd,
}  # fmt: skip
"""What reads the GPU's numbers on the host."""
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}
MIXES = {Tensor.copy_, Tensor.type_as, Tensor.data.__set__, Tensor.grad.__set__}  # type: ignore[attr-defined]


class PretendedGpu(TorchFunctionMode):
    """The rules of the GPU, for all calls of torch inside the context.

    Attributes:
        waits: What made the host wait, each with the file and line of this project that did it. Waits for a second
            stream's work alone do not count.
        raises: Whether a wait raises.
    """

    current: PretendedGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.raises = False
        self._own = threading.local()
        self._finished = 0
        self._copies: list[tuple[Tensor, Tensor]] = []  # (where on the host, what) that nobody has waited for
        self._read: list[tuple[Tensor, int]] = []  # sources of copies to the GPU, and their versions

    @property
    def stream(self) -> Stream:
        """The stream of this thread."""
        return getattr(self._own, "stream", USUAL)

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self._own.stream = stream

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if (special := SPECIAL.get(func)) is not None:
                return special(self, *args, **kwargs)
            return self._computed(func, args, kwargs)

    def _computed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        there, device = any(map(on_gpu, tensors)), kwargs.get("device")
        if there:
            self._require_own(tensors)
        if there and func in WAITS:
            self.wait(name(func))
            return func(*args, **kwargs)
        if there and func not in MIXES and func not in INDEXES:
            require_one_device(func, tensors)
        if device is not None and (there := torch.device(device).type == "cuda"):
            kwargs = kwargs | {"device": "cpu"}
            if func in FROM_PYTHON and not (args and on_gpu(args[0])):
                self.wait(f"{name(func)} of numbers of the host")
            if (generator := kwargs.get("generator")) is not None:
                raise RuntimeError(f"Expected a 'cuda' device type for generator but found {generator.device.type!r}")
        if there and func in INDEXES:
            self._see_index(func, args)
        if kwargs.get("pin_memory"):
            return as_pinned(func(*args, **kwargs | {"pin_memory": False}))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, self._made, result) if there else result

    def _require_own(self, tensors: Sequence[Tensor]) -> None:
        """Refuse a tensor of another stream that nothing waited for."""
        for tensor in tensors:
            stream, work = getattr(tensor, "made_on", (self.stream, 0))
            if stream is not self.stream and self.stream.seen.get(stream, 0) < work:
                raise RuntimeError(f"the work of another stream is not waited for at {place()}")

    def _made(self, tensor: Tensor) -> Tensor:
        """Return a result as a tensor of the GPU, which knows the second stream that made it."""
        result = to_gpu(tensor)
        if self.stream is not USUAL:
            self.stream.work += 1
            result.made_on = (self.stream, self.stream.work)  # type: ignore[attr-defined]
        return result

    def _see_index(self, func: Any, args: Sequence[Any]) -> None:
        """Record an index that the host must count or send."""
        assigns = func is Tensor.__setitem__
        for index in args[1] if isinstance(args[1], tuple) else [args[1]]:
            if isinstance(index, Tensor) and index.dim() and not on_gpu(index):
                self.wait("an index of the host")
            elif isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                if not assigns or (isinstance(args[2], Tensor) and args[2].dim()):
                    self.wait("a mask as index")
            elif isinstance(index, list) and not assigns:
                self.wait("a list as index")
        if assigns and isinstance(args[2], Tensor) and args[2].dim() and not on_gpu(args[2]):
            self.wait("an assignment of numbers of the host")

    def wait(self, what: str, until: int | None = None) -> None:
        """Record that the host waits for the GPU. After it all copies have happened, or the first ``until``.

        What waits on a second stream waits for that stream alone, unless it waits for an event of the usual one.

        Raises:
            RuntimeError: nothing may wait now.
        """
        if self.stream is not USUAL and until is None:
            return
        self.waits.append(f"{what} at {place()}")
        if self.raises:
            raise RuntimeError(f"the host waits for the GPU: {self.waits[-1]}")
        self.arrive(until)

    def arrive(self, count: int | None = None) -> None:
        """Finish all copies, or the first ``count`` since the context began."""
        finished = len(self._copies) if count is None else max(0, count - self._finished)
        for target, source in self._copies[:finished]:
            target.copy_(source)
        self._finished += finished
        for source, version in self._read:
            if source._version != version:
                raise RuntimeError("the source of a copy to the GPU changed before the GPU was waited for")
        self._copies, self._read = self._copies[finished:], []

    def begun(self) -> int:
        """Return how many copies have begun."""
        return self._finished + len(self._copies)

    def moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``Tensor.to``."""
        like = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if like is not None:
            args, kwargs = (GPU if on_gpu(like) else torch.device("cpu"), like.dtype), {}
        copy = kwargs.pop("copy", False)
        device, dtype, behind, layout = torch._C._nn._parse_to(*args, **kwargs)
        source, target = on_gpu(tensor), on_gpu(tensor) if device is None else device.type == "cuda"
        how: dict[str, Any] = {"copy": copy or source != target}
        if layout is not None:
            how["memory_format"] = layout
        result = tensor.to(dtype or tensor.dtype, **how)
        if result is tensor:
            return tensor
        if source == target:
            return to_gpu(result) if target else result
        if target:
            self._send(tensor, behind)
            return to_gpu(result)
        result = to_host(result)
        self._fetch(result, result.clone(), behind, pinned=behind)
        return result

    def copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """``Tensor.copy_``."""
        if on_gpu(target) == on_gpu(source):
            return target.copy_(source)
        if on_gpu(target):
            self._send(source, non_blocking)
            return target.copy_(source)
        target.copy_(source)
        self._fetch(target, to_host(source).clone(), non_blocking, pinned=is_pinned(target))
        return target

    def _send(self, source: Tensor, behind: bool) -> None:
        if behind and is_pinned(source):
            self._read.append((source, source._version))
        else:
            self.wait("a copy to the GPU" + " of memory that is not pinned" * behind)

    def _fetch(self, target: Tensor, value: Tensor, behind: bool, pinned: bool) -> None:
        if behind and pinned:
            target.fill_(float("nan") if target.is_floating_point() else 77)
            self._copies.append((target, value))
        else:
            self.wait("a copy to the host")

    def copied_each(self, targets: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool = False) -> None:
        """``torch._foreach_copy_``, which also copies from one device to another."""
        for target, source in zip(targets, sources, strict=True):
            self.copied(target, source, non_blocking)

    def to_the_host(self, tensor: Tensor) -> Tensor:
        """``Tensor.cpu``."""
        return self.moved(tensor, "cpu")

    def to_the_gpu(self, tensor: Tensor, device: Any = None, non_blocking: bool = False) -> Tensor:
        """``Tensor.cuda``."""
        return self.moved(tensor, GPU, non_blocking=non_blocking)

    def grouped(self, lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
        """What optimisers group their tensors by. Groups of the GPU say so."""
        groups = group_by_device(lists, with_indices)
        return {(GPU if on_gpu(group[0][0][0]) else device, dtype): group for (device, dtype), group in groups.items()}

    def copied_deeply(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """``Tensor.__deepcopy__``."""
        if not on_gpu(tensor):
            return tensor.__deepcopy__(memo)
        if id(tensor) not in memo:
            twin = to_gpu(tensor.detach().clone()).requires_grad_(tensor.requires_grad)
            twin._is_param = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = twin
        return memo[id(tensor)]

    def device_of(self, tensor: Tensor) -> torch.device:
        return GPU if on_gpu(tensor) else tensor.device


def pin_memory(tensor: Tensor) -> Tensor:
    """``Tensor.pin_memory``, in any thread."""
    if on_gpu(tensor):
        raise RuntimeError("cannot pin a tensor of the GPU")
    return as_pinned(tensor.clone())


def as_pinned(tensor: Tensor) -> Tensor:
    tensor.is_pretended_pinned = True  # type: ignore[attr-defined]
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether the tensor, or the one that it is a view of, lies in pinned memory."""
    return any(getattr(one, "is_pretended_pinned", False) for one in (tensor, tensor._base) if one is not None)


def require_one_device(func: Any, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors of the host beside those of the GPU. A single number may come from the host."""
    for tensor in tensors:
        if not on_gpu(tensor) and tensor.dim() and tensor.device.type != "meta":
            raise RuntimeError(
                f"{name(func)} takes tensors of one device, and one of {list(tensor.shape)} lies on the host; at "
                f"{place()}"
            )


def name(func: Any) -> str:
    return getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))


def place() -> str:
    """Return the innermost file and line of this project on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


INDEXES = {Tensor.__getitem__, Tensor.__setitem__}
SPECIAL: dict[Any, Callable[..., Any]] = {
    torch._C._nn._parse_to: lambda gpu, *args, **kwargs: torch._C._nn._parse_to(*args, **kwargs),
    Tensor.to: PretendedGpu.moved,
    Tensor.copy_: PretendedGpu.copied,
    torch._foreach_copy_: PretendedGpu.copied_each,
    Tensor.cpu: PretendedGpu.to_the_host,
    Tensor.cuda: PretendedGpu.to_the_gpu,
    Tensor.__deepcopy__: PretendedGpu.copied_deeply,
    torch._has_compatible_shallow_copy_type: lambda gpu, a, b: on_gpu(a) == on_gpu(b),
    Tensor.device.__get__: PretendedGpu.device_of,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda gpu, tensor: on_gpu(tensor),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda gpu, tensor: not on_gpu(tensor),  # type: ignore[attr-defined]
}


class Stream:
    """A queue of work beside the GPU's usual one."""

    def __init__(self, device: Any = None) -> None:
        self.work = 0
        self.seen: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        self.seen[other] = other.work


USUAL = Stream()


class Event:
    """A point in the GPU's work. Waiting for it waits for all before it, and for nothing after it."""

    def __init__(self, **options: Any) -> None:
        self.place: int | None = None

    def record(self, stream: Any = None) -> None:
        assert PretendedGpu.current is not None
        self.place = PretendedGpu.current.begun()

    def synchronize(self) -> None:
        if self.place is not None and PretendedGpu.current is not None:
            PretendedGpu.current.wait("an event", self.place)


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """``torch.cuda.stream``: the work inside the context is the stream's. Waits for it are not waits for the rest."""
    gpu = PretendedGpu.current
    assert gpu is not None
    before, gpu.stream = gpu.stream, stream
    try:
        yield
    finally:
        gpu.stream = before


@contextmanager
def pretended() -> Iterator[PretendedGpu]:
    """Let torch believe that this machine has one GPU."""
    gpu = PretendedGpu()
    properties = SimpleNamespace(name="a pretended GPU", total_memory=80 * 2**30, major=9, minor=0)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize"),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [],
        "set_rng_state": lambda state, device=None: None,
        "set_sync_debug_mode": lambda mode: setattr(gpu, "raises", mode == "error"),
        "Event": Event,
        "Stream": Stream,
        "stream": on_stream,
        "current_stream": lambda device=None: gpu.stream,
        "device": lambda index: nullcontext(),
    }
    begin, run = torch.autocast.__init__, threading.Thread.run

    def run_on_gpu(thread: threading.Thread) -> None:
        with gpu:
            run(thread)

    def on_host(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for key, answer in answers.items():
            patch.setattr(torch.cuda, key, answer)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", gpu.grouped)
        patch.setattr(Tensor, "pin_memory", pin_memory)
        patch.setattr(Tensor, "is_pinned", is_pinned)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        patch.setattr(torch.autocast, "__init__", on_host)
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda optimizer: None)
        patch.setattr(threading.Thread, "run", run_on_gpu)
        patch.setattr(torch, "compile", lambda module=None, **options: module)
        patch.setattr(nn.Module, "compile", lambda module, **options: None)
        patch.setattr(PretendedGpu, "current", gpu)
        with gpu:
            yield gpu
