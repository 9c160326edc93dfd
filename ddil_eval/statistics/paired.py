"""Differences that are paired by seed: Student's interval of the mean, and the exact sign-flip test."""

from __future__ import annotations

import numpy as np

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.estimate import Array, Estimate, t_interval

MOST_PAIRS = 40
"""The most pairs: the signs of one half of them are 2^20 sums, which fit the memory."""


def paired_difference(differences: Array) -> Estimate:
    """Return the mean of paired differences [n], with Student's 95 % interval and the p-value of the sign-flip test.

    The interval takes the differences as normal, the test does not. So near p = 0.05 the two may disagree.

    Raises:
        DdilError: there are fewer than two differences or more than ``MOST_PAIRS``, or one is not finite.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if not 2 <= n <= MOST_PAIRS:
        raise DdilError(f"paired differences are 2 to {MOST_PAIRS}, not {n}; take another number of seeds")
    if not np.isfinite(differences).all():
        raise DdilError("a measure is not finite, so that it cannot be compared; see the unit's record")
    value = float(differences.mean())
    low, high, _ = t_interval(value, float(differences.std(ddof=1) / np.sqrt(n)), n - 1)
    return Estimate(value, min(low, value), max(high, value), n, sign_flip_p_value(differences))


def sign_flip_p_value(differences: Array) -> float:
    """Return the exact two-sided p-value of "the differences are symmetric around 0" (Fisher's sign-flip test).

    It is the share of all 2^n signs whose |Σ ±d| reaches |Σ d|. The sums of one half of the differences are sorted, and
    for each sum of the other half a search counts its partners. So 2^(n/2) sums replace 2^n. The smallest p-value is
    2^(1−n).

    Args:
        differences: [n], n at most ``MOST_PAIRS``.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.float64))
    reached = abs(float(np.sum(differences))) - 1e-12 * float(sizes.sum())  # equal sums differ by rounding
    if reached <= 0:
        return 1.0
    first, second = (_signed_sums(half) for half in np.array_split(sizes, 2))
    second = np.sort(second)
    above = len(second) - np.searchsorted(second, reached - first, side="left")
    below = np.searchsorted(second, -reached - first, side="right")
    return float((above.sum() + below.sum()) / (len(first) * len(second)))


def _signed_sums(values: Array) -> Array:
    """Return the sums of values under all signs, [2^n]."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums
