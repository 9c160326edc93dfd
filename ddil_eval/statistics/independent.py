"""The difference of two values that were measured apart, from their intervals alone."""

from __future__ import annotations

import math
from typing import Protocol

from scipy.special import stdtr, stdtrit

from ddil_eval.statistics.estimate import CONFIDENCE, Estimate


class Interval(Protocol):
    """A value with its 95 % interval, as ``Estimate`` and as records hold it."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def n(self) -> int: ...


def independent_difference(new: Interval, old: Interval, degrees: float) -> Estimate:
    """Return ``new`` − ``old``, with an interval and a p-value, for two independent values.

    On each side the squares of the two half-widths add up (Zou and Donner, Statistics in Medicine 27, 2008; for
    Wilson's intervals it is Newcombe's method 10, 1998): low = d − √((new − new.low)² + (old.high − old)²), and
    high = d + √((new.high − new)² + (old − old.low)²). The p-value is Student's, with the half-width towards 0. So it
    is below 0.05 exactly where the interval excludes 0.

    For values of the same prompts, whose errors rise and fall together, the interval is too wide and the p-value too
    large.

    Args:
        new: The value that counts as positive.
        old: The value that is subtracted.
        degrees: The degrees of freedom of the value that has fewer.
    """
    value = new.value - old.value
    below = math.hypot(new.value - new.low, old.high - old.value)
    above = math.hypot(new.high - new.value, old.value - old.low)
    towards_0 = below if value > 0 else above
    if towards_0 == 0:
        p_value = 1.0 if value == 0 else 0.0
    else:
        t = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * abs(value) / towards_0
        p_value = float(2 * stdtr(degrees, -t))
    return Estimate(value, value - below, value + above, min(new.n, old.n), p_value)
