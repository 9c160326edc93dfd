"""The jackknife of any function of prompts, for tests of intervals and p-values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ddil_eval.statistics import Estimate, Jackknife, group_labels
from ddil_eval.statistics.jackknife import GROUPS, pseudovalues


def jackknife(
    value_of: Callable[[np.ndarray], np.ndarray], n: int, *, groups: int = GROUPS, seed: int = 0
) -> Jackknife:
    """Return the jackknife of ``n`` prompts. ``value_of`` takes the sorted indices of prompts and returns [cells]."""
    labels = group_labels(n, seed, groups)
    values = np.asarray(value_of(np.arange(n)), dtype=np.float64)
    replicates = np.stack([value_of(np.flatnonzero(labels != group)) for group in range(labels.max() + 1)])
    return Jackknife(values, pseudovalues(values, replicates, labels), np.bincount(labels))


def single_cells(measured: Jackknife) -> list[Estimate]:
    """Return the estimate of each cell."""
    return [measured.estimate(contrast) for contrast in np.eye(len(measured.values))]
