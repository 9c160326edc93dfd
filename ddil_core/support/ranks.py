"""Several processes on one piece of work, started by ``torchrun`` or ``accelerate launch``: who this one is, and whom it waits for.

Work is dealt out by its place in an order, never by who is free, so that results do not depend on the number of processes. What a
process makes lies in files of a folder that all of them see; only barriers go between them, over gloo whatever the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ddil_core.support.errors import DdilError, WrongCommand

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first may be long at work that they have no part in."""


def rank() -> int:
    """This process's number among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that reads the reference, writes records and shows progress."""
    return rank() == 0


def mine(count: int) -> range:
    """The places among ``count`` that this process works on."""
    return range(rank(), count, world())


def described(device: str) -> str:
    """A device for a record, with the number of processes where there are several."""
    return device if world() == 1 else f"{world()} × {device.partition(':')[0]}"


def barrier() -> None:
    """Wait until all processes are here.

    Raises:
        DdilError: another one has stopped.
    """
    if world() == 1:
        return
    import torch.distributed as dist

    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        dist.barrier()
    except RuntimeError as error:
        raise DdilError(
            f"process {rank()} of {world()} waits in vain for the others ({' '.join(str(error).split())}); "
            "see what they said, and run the same command again to go on"
        ) from error


@contextmanager
def main_first() -> Iterator[None]:
    """The block in the main process, and then in the others."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def require_one(what: str) -> None:
    """Raises WrongCommand: there are several processes, and ``what`` runs in one."""
    if world() > 1:
        raise WrongCommand(f"{what} runs in one process, and {world()} were started; start it by itself")
