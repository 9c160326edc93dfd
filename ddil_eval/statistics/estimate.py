"""A value with its interval and p-value, and both for means of scores by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from ddil_core.support.errors import DdilError

CONFIDENCE = 0.95
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval: ``low`` ≤ ``value`` ≤ ``high``.

    Attributes:
        value: The value.
        low: The lower end of the interval.
        high: The upper end of the interval.
        n: The number of samples (prompts or images).
        p_value: For a difference, the two-sided p-value of "the cells are equal". Below 0.05 exactly where the interval
            excludes 0, because both come from one distribution; permutation tests (``kernel_distance``) and sign-flip
            tests (``paired_difference``) may disagree with their intervals. None for other values.
        note: Why the value is not reliable, or None.
        degrees: Over training seeds and prompts, Satterthwaite's degrees of freedom of the interval; else None.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None
    note: str | None = None
    degrees: float | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.value):
            raise DdilError(
                f"a metric is {self.value:g}, which is not finite and cannot be compared; check the measured features "
                "for broken values"
            )
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not contain its value {self.value}")


Families = Sequence[Array]
"""For each independent family of training seeds, a contrast [seeds, cells] of each seed: see ``with_seeds``."""


def is_difference(contrast: Array) -> bool:
    """Return whether the weights over cells sum to 0, so that equal cells give 0."""
    return bool(abs(np.sum(contrast)) <= 1e-12 * np.abs(contrast).sum())


def is_level(contrast: Array) -> bool:
    """Return whether the weights make a mean of cells, which has the bounds of a single cell."""
    return bool(np.min(contrast) >= 0 and abs(np.sum(contrast) - 1) <= 1e-12)


def estimate_mean(
    values: Array,
    contrast: Array,
    by_seed: Families = (),
    *,
    rate: bool = False,
    lowest: float = -np.inf,
    highest: float = np.inf,
) -> Estimate:
    """Return a contrast of the cells' means over prompts, with its interval.

    Nothing is random, and the order of prompts does not matter. The interval is the wider of Student's t and of Hall's
    t (1992), which corrects for skew; the p-value is the larger of the two. Student's t alone is too narrow for skewed
    scores, Hall's alone for scores with heavy tails.

    A single rate has Wilson's interval. In a difference of rates, ``rate_error`` counts one more prompt of each cell as
    different. Otherwise the interval of cells without a differing prompt would have no width.

    With training seeds the interval is over seeds and prompts (``with_seeds``), by Student's t.

    Args:
        values: Scores [n, cells], one for each prompt and cell.
        contrast: Weights [cells].
        by_seed: For each family of training seeds, a contrast [seeds, cells] of each seed.
        rate: Scores lie in [0, 1], such as 1 for a prompt drawn right.
        lowest: The lower bound of a single cell's value. The interval of a single cell, or of a mean of cells, does not
            pass the bounds.
        highest: The upper bound of a single cell's value.

    Raises:
        DdilError: there are fewer than two prompts, or scores are not finite.
    """
    contrast = np.asarray(contrast, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise DdilError(f"{n} prompt is too few for an interval; measure at least 2")
    scores = values @ contrast
    with np.errstate(over="ignore", invalid="ignore"):
        variance = scores.var()
    if not np.isfinite(variance):  # also where one score is not finite
        raise DdilError(
            "scores hold values that are not finite or too large to compare; check the measured images for broken ones"
        )
    value, difference, single = float(scores.mean()), is_difference(contrast), is_level(contrast)
    families = [values.mean(axis=0) @ family.T for family in by_seed]
    degrees = float(n - 1)
    if rate:
        low, high, p_value, degrees = _rate_interval(scores, contrast, families, single=single)
    elif families:
        error, degrees = with_seeds(float(scores.std(ddof=1) / np.sqrt(n)), _informative(scores, difference), families)
        low, high, p_value = t_interval(value, error, degrees)
    else:
        low, high, p_value = _skewed_interval(scores, difference)
    if single:
        low, high = max(low, min(lowest, value)), min(high, max(highest, value))
    tested, shown = p_value if difference else None, degrees if families else None
    return Estimate(value, min(low, value), max(high, value), n, tested, degrees=shown)


def _rate_interval(
    scores: Array, contrast: Array, families: Sequence[Array], *, single: bool
) -> tuple[float, float, float, float]:
    """Return low, high, p-value and degrees of freedom of a contrast of rates, whose scores by prompt are given."""
    n, value, error = len(scores), float(scores.mean()), float(scores.std() / np.sqrt(len(scores)))
    if single:
        error, degrees = with_seeds(error, n - 1, families)
        t = float(stdtrit(degrees, (1 + CONFIDENCE) / 2) if families else ndtri((1 + CONFIDENCE) / 2))
        return *score_interval(value, error, n, t, 1.0), 1.0, degrees
    error, degrees = with_seeds(rate_error(error, contrast, n), n - 1, families)
    low, high, p_value = t_interval(value, error, degrees)
    largest = float(np.abs(contrast).sum() / 2 if is_difference(contrast) else np.inf)
    return max(low, -largest), min(high, largest), p_value, degrees


def against_zero(scores: Array) -> Estimate:
    """Return the mean of differences [n] with its interval and the p-value of 0."""
    return estimate_mean(np.stack([scores, np.zeros_like(scores)], axis=1), np.array([1.0, -1.0]))


def t_interval(value: float, error: float, degrees: float) -> tuple[float, float, float]:
    """Return low, high and the two-sided p-value of 0 by Student's t.

    Where ``error`` is 0, all scores are equal: the interval has no width, and p is 1 for the value 0, else 0.
    """
    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error
    if error == 0:
        return value, value, 1.0 if value == 0 else 0.0
    return value - half, value + half, float(2 * stdtr(degrees, -abs(value) / error))


def with_seeds(error: float, degrees: float, families: Sequence[Array]) -> tuple[float, float]:
    """Add the variance of training seeds to a standard error over prompts.

    The values of M seeds have the variance s², and their mean s²/M. Both this and the variance over prompts hold that
    of single scores, so that the sum is at least the true variance on average. Degrees of freedom are Satterthwaite's.

    Args:
        error: The standard error over prompts.
        degrees: Its degrees of freedom.
        families: The values of the seeds, at least two, of each independent family of seeds. Without any, nothing is
            added.

    Returns:
        The standard error and its degrees of freedom.
    """
    if not families:
        return error, degrees
    return combined([(error**2, degrees), *((float(one.var(ddof=1) / len(one)), len(one) - 1) for one in families)])


def combined(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the standard error of a sum, and Satterthwaite's degrees of freedom.

    Where no score differs, all parts are 0, and the degrees of freedom are those of equal parts. One score that
    differs, of one seed and one prompt, would make the parts of seeds and of prompts equal.

    Args:
        parts: The variance of each part with its degrees of freedom.
    """
    variance = sum(part for part, _ in parts)
    shares = [part / variance if variance > 0 else 1 / len(parts) for part, _ in parts]
    weights = sum(share**2 / degrees for share, (_, degrees) in zip(shares, parts, strict=True))
    return float(np.sqrt(variance)), 1 / weights


def rate_error(error: float, contrast: Array, n: int) -> float:
    """Return the standard error of a contrast of rates with one more differing prompt in each cell.

    Near the bounds few prompts differ, or none, and ``error`` is too small. In the middle the added prompt has no
    effect.
    """
    return float(np.hypot(error, np.linalg.norm(contrast) / np.sqrt(2) / n))


def score_interval(value: float, error: float, n: int, t: float, highest: float) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a rate: all rates p that lie within t of p's own standard errors of ``value``.

    The variance is φ p (1 − p) for a share, or φ p for a rate without an upper bound. φ comes from ``error``
    instead of 1/n, as for samples that are not independent (Korn and Graubard, 1998). Near a bound ``error`` rests on
    very few samples, so φ counts one more independent sample.

    Args:
        value: The measured rate.
        error: The standard error of the measured rate.
        n: The number of samples.
        t: The half-width in standard errors.
        highest: The upper bound: 1 for a share, infinity without a bound.
    """
    upper = 1 / highest
    phi = (error**2 + 1 / n**2) / (value * (1 - upper * value) + 1 / n)
    shrink = 1 + upper * t**2 * phi
    middle = value + t**2 * phi / 2
    half = t * np.sqrt(phi * value * (1 - upper * value) + (t * phi / 2) ** 2)
    return float((middle - half) / shrink), float((middle + half) / shrink)


def _skewed_interval(scores: Array, difference: bool) -> tuple[float, float, float]:
    """Return low, high and p-value of a mean: on each side the wider of Student's t and Hall's t."""
    n, value = len(scores), float(scores.mean())
    error = float(scores.std(ddof=1) / np.sqrt(n))
    degrees = _informative(scores, difference)
    low, high, p_value = t_interval(value, error, degrees)
    if error == 0:
        return low, high, p_value
    skew = float(np.mean(((scores - value) / scores.std()) ** 3) / np.sqrt(n))
    t = float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
    low = min(low, value - error * _uncorrected(t, skew))
    high = max(high, value - error * _uncorrected(-t, skew))
    return low, high, max(p_value, float(2 * stdtr(degrees, -abs(_corrected(value / error, skew)))))


def _informative(scores: Array, difference: bool) -> int:
    """Return the degrees of freedom of a mean. In a difference, prompts with equal cells say nothing of the spread."""
    return max(1, int(np.count_nonzero(scores) if difference else len(scores)) - 1)


def _corrected(t: float, skew: float) -> float:
    """Return Hall's transform of a t-statistic (J. R. Stat. Soc. B 54, 1992); ``skew`` is skewness / √n."""
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def _uncorrected(corrected: float, skew: float) -> float:
    """Return the inverse of ``_corrected``, which increases with t."""
    if abs(skew) < 1e-6:  # the cubic is linear within rounding
        return corrected - skew * corrected**2 / 3 - skew / 6
    return 3 / skew * (float(np.cbrt(1 + skew * (corrected - skew / 6))) - 1)
