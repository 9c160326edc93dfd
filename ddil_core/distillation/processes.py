"""Division of rows: over the processes of a run, and into parts that fit into memory.

Everything random is drawn whole in every process, from (seed, stage, step). Only evaluations of networks are divided. All
processes hold the same result.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor


def own_rows(accelerator: Accelerator, count: int) -> slice:
    """Return this process's rows of ``count`` rows. Every process takes all rows where there are fewer rows than processes."""
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
