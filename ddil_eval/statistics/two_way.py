"""Means over training seeds and prompts together: each score belongs to one seed and one prompt.

Students of several seeds are measured on the same prompts. Both are samples: other seeds would give other students, and
other prompts other scores. An interval over prompts alone speaks of these students only, and one over seeds alone of
these prompts only, because what a prompt does to all students cannot be seen between seeds.

With M seeds and N prompts, the variance of the mean is estimated as s²/M + p²/N, where s² is the variance of the M
means over prompts and p² that of the N means over seeds. Both parts hold the variance of single scores, so that the
estimate is at least the true variance on average. Degrees of freedom are Satterthwaite's. The test of 0 is Clark's
min F′ (1973, J. Verbal Learning and Verbal Behavior 12, 335).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.estimate import CONFIDENCE, Array, Estimate, combined, t_interval


@dataclass(frozen=True)
class TwoWay:
    """The mean of scores by seed and prompt, and the two parts of its variance.

    Attributes:
        mean: The mean with its interval over seeds and prompts.
        seeds: The standard deviation s of the means of seeds. It adds s²/M to the variance of the mean.
        prompts: The standard deviation p of the means of prompts. It adds p²/N.
    """

    mean: Estimate
    seeds: Estimate
    prompts: Estimate


def two_way(scores: Array, *, difference: bool) -> TwoWay:
    """Estimate the mean of scores over seeds and prompts.

    Args:
        scores: Scores [M, N] of M seeds and N prompts.
        difference: Whether the scores are differences, whose mean is tested against 0.

    Raises:
        DdilError: there are fewer than two seeds or prompts, or scores are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if min(scores.shape) < 2:
        raise DdilError(
            f"{scores.shape[0]} seeds and {scores.shape[1]} prompts are too few; measure at least 2 of each"
        )
    if not np.isfinite(scores).all():
        raise DdilError("scores are not finite and cannot be compared; check the measured models for broken weights")
    count, value = scores.shape[1], float(scores.mean())
    means = scores.mean(axis=1), scores.mean(axis=0)
    parts = [(float(one.var(ddof=1) / len(one)), len(one) - 1) for one in means]
    error, degrees = combined(parts)
    low, high, p_value = t_interval(value, error, degrees)
    mean = Estimate(value, low, high, count, p_value if difference else None, degrees=degrees)
    return TwoWay(mean, *(_deviation(one) for one in means))


def _deviation(values: Array) -> Estimate:
    """Return the standard deviation of some values, with the interval of normal ones (chi-square)."""
    degrees = len(values) - 1
    value = float(values.std(ddof=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = (value * float(np.sqrt(degrees / chdtri(degrees, share))) for share in (tail, 1 - tail))
    return Estimate(value, min(low, value), max(high, value), len(values))
