"""The same work on many images at once, in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ddil_core.support import ranks

R = TypeVar("R")

MOST = 8
"""The most threads. Between Pillow's calls Python runs one of them at a time, so that more gain nothing."""


def side_by_side(work: Callable[[np.ndarray], R], images: Sequence[np.ndarray] | np.ndarray) -> list[R]:
    """Return ``work(image)`` of every image, in order, by up to ``MOST`` threads.

    One process takes as many threads as torch may use. Of several processes on a machine each takes its share of the
    cores.

    This is for work that Pillow does, such as resizing, which lets other threads run. It saves time where a GPU draws
    images faster than one thread prepares them.
    """
    import torch

    share = torch.get_num_threads() if ranks.world() == 1 else ranks.share_of_cores()
    threads = min(MOST, share, len(images))
    if threads < 2:
        return [work(image) for image in images]
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
        return list(pool.map(work, images))
