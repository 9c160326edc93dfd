"""The processes of a run, and the division of rows: over the processes, and into parts that fit into memory.

Everything random is drawn whole in every process, from (seed, stage, step). Only evaluations of networks are divided.
All processes hold the same result.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from ddil_core.distillation.config import MethodConfig
from ddil_core.support.errors import WrongCommand

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
ENCODING_TIME = timedelta(hours=6)
"""How long processes wait for the first one while it encodes the data."""


def make_accelerator(config: MethodConfig, out: Path, device: str | None) -> Accelerator:
    """Return the accelerator of a run. Its trackers write to ``out/tracked``.

    Raises:
        WrongCommand: the package of a tracker is not installed.
    """
    for name in config.trackers:
        if find_spec(TRACKER_PACKAGES[name]) is None:
            package = TRACKER_PACKAGES[name]
            raise WrongCommand(
                f"the tracker {name!r} needs a package that is not installed: pip install {package}, or set trackers "
                "to []"
            )
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


def own_rows(accelerator: Accelerator, count: int) -> slice:
    """Return this process's rows of ``count`` rows.

    Every process takes all rows where there are fewer rows than processes.
    """
    if count < accelerator.num_processes:
        return slice(None)
    return slice(accelerator.process_index, None, accelerator.num_processes)


def gather_rows(accelerator: Accelerator, own: Tensor, rows: slice | Tensor, count: int) -> Tensor:
    """Return all rows [count, …] in every process. Each process gives its ``own``, which belong at ``rows``."""
    if len(own) == count:
        return own
    whole = own.new_zeros(count, *own.shape[1:])
    whole[rows] = own
    return accelerator.reduce(whole, "sum") if whole.numel() else whole


def slices(count: int, size: int) -> list[slice]:
    """Return consecutive parts of ``count`` rows, each of at most ``size``."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
