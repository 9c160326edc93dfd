"""Work on rows in parts that fit into the memory of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ddil_core.support.progress import warn_once

T = TypeVar("T")


class Fitting:
    """Works on rows, and halves the number of rows at once where the memory is too small for them.

    Rows do not depend on each other, so that the results are the same within the rounding of another batch.
    """

    def __init__(self, what: str) -> None:
        """``what`` names the work in a warning, such as "the network"."""
        self.what = what
        self.most: int | None = None
        """The most rows at once, where more did not fit."""

    def parts(self, work: Callable[[slice], T], count: int) -> list[T]:
        """Call ``work`` on consecutive slices of ``count`` rows and return what it returns, in order.

        Raises:
            OutOfMemoryError: not even one row fits.
        """
        if not count:
            return [work(slice(0, 0))]
        done, results = 0, list[T]()
        while done < count:
            size = min(self.most or count, count - done)
            try:
                results.append(work(slice(done, done + size)))
                done += size
                continue
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Outside of the handler, because the error holds the tensors of the work.
            self.most = (size + 1) // 2
            warn_once(
                f"the memory of the device is too small for {size} rows of {self.what} at once; taking {self.most}"
            )
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        return results
