"""Several processes of one command, started by ``torchrun`` or ``accelerate launch``.

A process takes work by its place in an order, not by who is free. So results do not depend on the number of processes.
Processes exchange results through files in a shared folder. Between them go only barriers, over gloo on every device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import shown

_CURE = "unset it, or start the processes with torchrun"
PATIENCE = timedelta(days=7)
"""How long a process waits at a barrier. The main process may work alone for long."""

ARRIVAL = timedelta(minutes=10)
"""How long a process waits for the others to start. One that dies before is missed after this time."""

_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket|timed out", re.IGNORECASE)
"""What messages of torch.distributed say where another process is gone."""

_groups: list[Any] = []
"""The group of all processes, once they have met. It is apart from the group that trains, which may use GPUs."""


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return _number("RANK", 0, 0)


def world() -> int:
    """Return the number of processes."""
    return _number("WORLD_SIZE", 1, 1)


def local_rank() -> int:
    """Return the number of this process on its machine, from 0. It is also the number of its GPU."""
    return _number("LOCAL_RANK", 0, 0)


def share_of_cores() -> int:
    """Return how many cores each process of this machine has. torch does not say it: torchrun sets it to one thread."""
    here = _number("LOCAL_WORLD_SIZE", default=1, least=1)
    return max(1, len(os.sched_getaffinity(0)) // here) if hasattr(os, "sched_getaffinity") else 1


def require_valid() -> None:
    """Refuse wrong values of ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` before any work.

    Raises:
        WrongCommand: one is no whole number in its range, or ``RANK`` is not below ``WORLD_SIZE``.
    """
    local_rank()
    if rank() >= world():
        raise WrongCommand(f"the environment variable RANK is {rank()}, and WORLD_SIZE is {world()}; {_CURE}")


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or int(text) < least:
        raise WrongCommand(
            f"the environment variable {name} is {shown(text)}, which is no whole number of at least {least}; {_CURE}"
        )
    return int(text)


def is_main() -> bool:
    """Whether this process reads the reference, writes records and shows progress."""
    return rank() == 0


def mine(count: int) -> range:
    """Return the places, from 0 to ``count`` − 1, on which this process works."""
    return range(rank(), count, world())


def described(device: str) -> str:
    """Describe a device for a record, with the number of processes where there are several."""
    return device if world() == 1 else f"{world()} × {device.partition(':')[0]}"


def meet() -> None:
    """Wait until all processes have started, for at most ``ARRIVAL``. The first barrier of a command begins with this.

    Raises:
        WrongCommand: the environment does not say where the processes meet.
        DdilError: a process did not start in this time, or has stopped.
    """
    if world() == 1 or _groups:
        return
    from torch.distributed import ProcessGroupGloo
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise WrongCommand(f"the environment variable WORLD_SIZE is {world()}, and {name} is not set; {_CURE}")
    with others_named():
        store, _, _ = next(rendezvous("env://", rank(), world(), timeout=ARRIVAL))
        store.set_timeout(ARRIVAL)
        _groups.append(ProcessGroupGloo(PrefixStore("ddil", store), rank(), world(), ARRIVAL))


def barrier() -> None:
    """Wait until all processes call this.

    Raises:
        DdilError: another process has stopped.
    """
    if world() == 1:
        return
    meet()
    import torch.distributed as dist

    options = dist.BarrierOptions()
    options.timeout = PATIENCE
    with others_named():
        _groups[0].barrier(options).wait()


@contextmanager
def others_named() -> Iterator[None]:
    """Turn an error that another process causes by stopping into one sentence.

    Raises:
        DdilError: another process has stopped, or did not start.
    """
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not _LOST.search(str(error)):
            raise
        reason = " ".join(str(error).split()).partition(". This is typically")[0]  # gloo goes on with advice
        raise DdilError(
            f"process {rank()} of {world()} waits in vain for the others ({reason}); see what they said, and run the "
            "same command again to go on"
        ) from error


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first, and then in the others."""
    meet()  # before the work of the main process, which may take long
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def require_one(what: str) -> None:
    """Refuse several processes for ``what``, which runs in one.

    Raises:
        WrongCommand: there are several processes.
    """
    if world() > 1:
        raise WrongCommand(f"{what} runs in one process, and {world()} were started; start it by itself")
