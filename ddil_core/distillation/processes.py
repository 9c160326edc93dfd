"""The processes of a run, and the division of rows: over the processes, and into parts that fit into memory.

Everything random is drawn whole in every process, from (seed, stage, step). Only evaluations of networks are divided.
All processes hold the same result.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from ddil_core.distillation.config import MethodConfig
from ddil_core.support import ranks
from ddil_core.support.devices import sent
from ddil_core.support.errors import WrongCommand

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
ENCODING_TIME = timedelta(hours=6)
"""How long processes wait for the first one while it encodes the data."""


def make_accelerator(config: MethodConfig, out: Path, device: str | None) -> Accelerator:
    """Return the accelerator of a run. Its trackers write to ``out/tracked``.

    Raises:
        WrongCommand: the package of a tracker is not installed, or an earlier run of this process had another device
            or precision.
        DdilError: another process did not start, or has stopped.
    """
    for name in config.trackers:
        if find_spec(TRACKER_PACKAGES[name]) is None:
            package = TRACKER_PACKAGES[name]
            raise WrongCommand(
                f"the tracker {name!r} needs a package that is not installed: pip install {package}, or set trackers "
                "to []"
            )
    if device is not None and device.startswith("cuda:"):
        torch.cuda.set_device(device)  # accelerate takes the current GPU
    ranks.barrier()  # all processes are here, so that none waits for hours for one that did not start
    try:
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision=config.mixed_precision,
            log_with=list(config.trackers) or None,
            project_dir=out / "tracked" if config.trackers else None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=ENCODING_TIME),
            ],
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise WrongCommand(
            "this process has distilled on another device or with another mixed_precision before, and accelerate keeps "
            "both for a process; start this run in a process of its own"
        ) from error


def own_rows(accelerator: Accelerator, count: int) -> slice:
    """Return this process's rows of ``count`` rows.

    Every process takes all rows where there are fewer rows than processes.
    """
    if count < accelerator.num_processes:
        return slice(None)
    return slice(accelerator.process_index, None, accelerator.num_processes)


def owners(accelerator: Accelerator, count: int) -> Tensor:
    """Return which process takes each of ``count`` rows, int64 [count]. See ``own_rows``."""
    return torch.arange(count) % accelerator.num_processes


def gather_rows(accelerator: Accelerator, own: Tensor, owner: Tensor) -> Tensor:
    """Return all rows [count, …] in every process.

    Args:
        accelerator: The processes.
        own: The rows of this process, in their order. All rows, where every process takes all.
        owner: The process of each row, int64 [count] on the host, the same in every process.
    """
    if len(own) == len(owner):
        return own
    if not own.numel():  # rows without a number, which no process needs to send
        return own.new_empty(len(owner), *own.shape[1:])
    counts = torch.bincount(owner, minlength=accelerator.num_processes)
    most = int(counts.max())
    if len(own) < most:  # processes send equal numbers of rows
        own = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
    gathered: Tensor = accelerator.gather(own.contiguous())
    order = torch.argsort(owner, stable=True)
    place = torch.empty_like(owner)
    place[order] = torch.cat([torch.arange(int(n)) + process * most for process, n in enumerate(counts)])
    return gathered[sent(place, gathered.device)]


def slices(count: int, size: int) -> list[slice]:
    """Return consecutive parts of ``count`` rows, each of at most ``size``."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
