"""One run in several processes: each does its own part of what one process would do, and all of them hold the same result.

Everything random is drawn whole in every process, from (seed, stage, step); only what costs network evaluations is divided.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor


def own_rows(accelerator: Accelerator, count: int) -> slice:
    """This process's rows of ``count``: every one of so many. Fewer rows than processes are all done in each."""
    if count < accelerator.num_processes:
        return slice(None)
    return slice(accelerator.process_index, None, accelerator.num_processes)


def gather_rows(accelerator: Accelerator, own: Tensor, rows: slice | Tensor, count: int) -> Tensor:
    """All ``count`` rows [count, …] in every process, from each its ``own`` at its ``rows``."""
    if len(own) == count:
        return own
    whole = own.new_zeros(count, *own.shape[1:])
    whole[rows] = own
    return accelerator.reduce(whole, "sum") if whole.numel() else whole
