"""A value with its interval; the mean of per-prompt scores, with a p-value for a difference from the same distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from ddil_core.support.errors import DdilError

CONFIDENCE = 0.95
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from ``n`` samples (prompts or pictures). ``low`` ≤ ``value`` ≤ ``high``.

    ``p_value`` is for a difference, two-sided: how often cells that do not differ would give one as large. It is below 0.05
    exactly where the interval excludes 0, since both come from one distribution. ``note`` says why the value is not to be
    trusted, where it is not.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.value):
            raise DdilError(
                f"a metric is {self.value:g}, which is not finite and cannot be compared; look for broken features among those "
                "measured"
            )
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not contain its point {self.value}")


def is_difference(contrast: Array) -> bool:
    """Whether weights over cells sum to 0, so that cells which do not differ give 0."""
    return bool(abs(np.sum(contrast)) <= 1e-12 * np.abs(contrast).sum())


def estimate_mean(
    values: Array, contrast: Array, *, rate: bool = False, lowest: float = -np.inf, highest: float = np.inf
) -> Estimate:
    """Σ contrast · mean over prompts of per-prompt scores ``values`` [n, cells], with its interval.

    Nothing is drawn at random, and the order of prompts does not matter. For a mean the interval and the p-value are those of
    Student's t, and of the t that Hall (1992) corrects for skew, whichever are the wider and the larger: t alone misses skewed
    scores, and Hall's alone those with heavy tails.

    A ``rate`` is a mean of scores in [0, 1], such as the share of prompts drawn right. One cell has Wilson's interval. In a
    difference one more prompt of each cell is taken to differ (``rate_error``): without it, cells of which no prompt differs
    would have an interval of no width.

    Args:
        lowest, highest: the bounds of a single cell's value, which its interval does not pass.

    Raises:
        DdilError: fewer than two prompts, or scores that are not finite.
    """
    contrast = np.asarray(contrast, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise DdilError(f"{n} prompt is too few for an interval; ask for at least 2")
    scores = values @ contrast
    with np.errstate(over="ignore", invalid="ignore"):
        spread = scores.var()
    if not np.isfinite(spread):  # nor is it where a score is not
        raise DdilError(
            "scores hold values that are not finite, or too large to compare; look for broken pictures among those measured"
        )
    value, paired, alone = float(scores.mean()), is_difference(contrast), np.count_nonzero(contrast) == 1
    p_value = None
    if rate and alone:
        z = float(ndtri((1 + CONFIDENCE) / 2))
        low, high = score_interval(value, float(scores.std() / np.sqrt(n)), n, z, 1.0)
    elif rate:
        error = rate_error(float(scores.std() / np.sqrt(n)), contrast, n)
        low, high, p_value = t_interval(value, error, n - 1)
        largest = float(np.abs(contrast).sum() / 2 if paired else np.inf)
        low, high = max(low, -largest), min(high, largest)
    else:
        low, high, p_value = _skewed_interval(scores, paired)
    if alone:
        low, high = max(low, min(lowest, value)), min(high, max(highest, value))
    return Estimate(value, min(low, value), max(high, value), n, p_value if paired else None)


def t_interval(value: float, error: float, degrees: int) -> tuple[float, float, float]:
    """Low, high, and the two-sided p-value of 0, by Student's t; cells that are equal prompt for prompt have no width and p = 1."""
    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error
    if error == 0:
        return value, value, 1.0 if value == 0 else 0.0
    return value - half, value + half, float(2 * stdtr(degrees, -abs(value) / error))


def rate_error(error: float, contrast: Array, n: int) -> float:
    """The standard error of a contrast of rates, if one more of the n prompts of each cell differed.

    Near the bounds hardly a prompt differs, and none may be seen to: the error that was found is then too small. In the middle
    the prompt that is added counts for nothing.
    """
    return float(np.hypot(error, np.linalg.norm(contrast) / np.sqrt(2) / n))


def score_interval(value: float, error: float, n: int, t: float, highest: float) -> tuple[float, float]:
    """The rates p that ``value`` is no more than t standard errors away from, where the error is the one that p would have.

    Wilson's interval (1927), with the variance φ p (1 − p) of a share, or φ p of a rate without an upper bound, and φ from
    ``error`` in place of 1/n, as for samples that are not independent (Korn and Graubard, 1998). Near a bound the error was
    found from a handful of samples, and from none at it: one more sample, drawn independently, is taken to lie there.
    """
    upper = 1 / highest
    phi = (error**2 + 1 / n**2) / (value * (1 - upper * value) + 1 / n)
    shrink = 1 + upper * t**2 * phi
    middle = value + t**2 * phi / 2
    half = t * np.sqrt(phi * value * (1 - upper * value) + (t * phi / 2) ** 2)
    return float((middle - half) / shrink), float((middle + half) / shrink)


def _skewed_interval(scores: Array, paired: bool) -> tuple[float, float, float]:
    """Low, high and p-value of a mean: the wider of Student's t and of Hall's t, on either side."""
    n, value = len(scores), float(scores.mean())
    error = float(scores.std(ddof=1) / np.sqrt(n))
    # Prompts whose cells do not differ tell nothing of how much those that do vary.
    seen = np.count_nonzero(scores) if paired else n
    degrees = max(1, int(seen) - 1)
    low, high, p_value = t_interval(value, error, degrees)
    if error == 0:
        return low, high, p_value
    skew = float(np.mean(((scores - value) / scores.std()) ** 3) / np.sqrt(n))
    t = float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
    low = min(low, value - error * _uncorrected(t, skew))
    high = max(high, value - error * _uncorrected(-t, skew))
    return low, high, max(p_value, float(2 * stdtr(degrees, -abs(_corrected(value / error, skew)))))


def _corrected(t: float, skew: float) -> float:
    """Hall's transformation of a t-statistic (J. R. Stat. Soc. B 54, 1992); ``skew`` is the scores' skewness / √n."""
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def _uncorrected(corrected: float, skew: float) -> float:
    """The inverse of ``_corrected``, which grows with t."""
    if abs(skew) < 1e-6:  # the cubic is a line within rounding
        return corrected - skew * corrected**2 / 3 - skew / 6
    return 3 / skew * (float(np.cbrt(1 + skew * (corrected - skew / 6))) - 1)
