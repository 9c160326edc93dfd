"""Draws that are made on the host one update ahead, while the device still computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes what an update reads on the host while the device still computes the update before.

    What is made depends on its step alone. So it is the same whether it was made ahead or not, and a resumed run finds
    the same.

    Attributes:
        enabled: Whether anything is made ahead. On a CPU there is nothing to gain, because one processor does both.
    """

    def __init__(self, make: Callable[[int], T], device: torch.device) -> None:
        """``make(step)`` is called in another thread. It may read only what no update changes."""
        self.make, self.enabled = make, device.type == "cuda"
        self._worker: ThreadPoolExecutor | None = None
        self._made: tuple[int, Future[T]] | None = None

    def take(self, step: int, then: int | None) -> T:
        """Return what ``make(step)`` gives, and begin with ``then``, the step that is probably next."""
        made, self._made = self._made, None
        found = made[1].result() if made is not None and made[0] == step else self.make(step)
        if self.enabled and then is not None:
            self._worker = self._worker or ThreadPoolExecutor(1, "ddil-ahead")
            self._made = (then, self._worker.submit(self.make, then))
        return found


class Draws(NamedTuple):
    """Random numbers and rows of the pool, drawn on the host for forward-diffused data [B, …].

    Attributes:
        x0: Data.
        row: Their rows of the pool.
        time: Transitions of a grid or timesteps, int64.
        eps: Noise.
        guidance: Guidance scales; None where all states share one.
    """

    x0: Tensor
    row: Tensor
    time: Tensor
    eps: Tensor
    guidance: Tensor | None = None
