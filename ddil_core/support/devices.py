"""The device that a model computes on and the torch dtype that it computes in, by name; copies, streams and waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from ddil_core.support import ranks
from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import shown

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Short names of the dtypes that a model computes in, and torch's names."""


def choose_device(name: str | None = None) -> str:
    """Return the device of this name, or the best device of this machine for None. A GPU with a number becomes current.

    With several processes on a machine, ``cuda`` gives each process a GPU of its own.

    Raises:
        WrongCommand: the machine has no such device, or fewer GPUs than processes.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if gpus else "cpu"
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in known:
        raise WrongCommand(f"this machine has no device {shown(name)}; leave out --device to take the best one")
    if name == "cuda" and ranks.world() > 1:
        if ranks.local_rank() >= gpus:
            raise WrongCommand(
                f"process {ranks.local_rank()} of this machine (counted from 0) has no GPU: the machine has {gpus}; "
                "start as many processes as there are GPUs"
            )
        name = f"cuda:{ranks.local_rank()}"
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # streams, events and figures of memory are of the current GPU
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name in ``DTYPES``, short or torch's own.

    Raises:
        WrongCommand: a model cannot compute in this dtype.
    """
    import torch

    full = DTYPES.get(name, name)
    if full not in DTYPES.values():
        raise WrongCommand(f"the dtype {shown(name)} is not known; it may be one of {', '.join(DTYPES.values())}")
    dtype: torch.dtype = getattr(torch, full)
    return dtype


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a host tensor in memory from which a GPU copies by itself. On another device it stays where it is."""
    return tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor


def wait_for(device: torch.device | str) -> None:
    """Wait until a GPU has done all its work."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def work_until_now(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for what this thread has given a GPU until now, and for nothing that comes later."""
    import torch

    if device.type != "cuda":
        return lambda: None
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))  # the device may be another than the current GPU
    return done.synchronize


@contextmanager
def beside(device: torch.device | str, work: str) -> Iterator[Callable[[Iterable[torch.Tensor]], None]]:
    """Let a GPU work inside the context beside what it has to do, so that the host can wait for this work alone.

    The context gives a function. Call it afterwards with the tensors that are needed outside.

    Args:
        device: The device. A CPU works as always.
        work: The name of the work. Work of one name has a stream of its own, and is done in its order.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        yield lambda tensors: None
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    stream, outside = _stream(index, work), torch.cuda.current_stream(index)

    def take_over(tensors: Iterable[torch.Tensor]) -> None:
        outside.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(outside)  # so that its memory is not used again before the work outside is done

    with torch.cuda.device(index), torch.cuda.stream(stream):
        yield take_over


@cache
def _stream(index: int, work: str) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(index)


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host. A GPU copies behind its work: read the numbers after an event that follows."""
    import torch

    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the device. A copy from the host does not wait for the work of the device."""
    return pinned(tensor, device).to(device, non_blocking=device.type == "cuda")
