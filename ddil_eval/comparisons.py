"""Which differences of a table are significant: one p-value for each comparison, corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from ddil_eval.store import Estimate, Measured

LEVEL = 0.05
"""What is marked as significant has a corrected p-value below it."""

_QUANTILE = 1.959963984540054
Key = TypeVar("Key")


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down p-values (1979) of one family of tests: below α, they keep the chance of any false one below α."""
    corrected: dict[Key, float] = {}
    largest = 0.0
    for place, (key, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_value))
        corrected[key] = largest
    return corrected


def is_sound(estimate: Estimate) -> bool:
    """Whether an estimate may be compared with another: its numbers are finite, and no note says to distrust it."""
    return estimate.note is None and all(map(math.isfinite, (estimate.value, estimate.low, estimate.high)))


def p_value(difference: Estimate) -> float:
    """The p-value of a difference; where it has none, the one that its 95 % interval implies, below 0.05 where that excludes 0."""
    if difference.p_value is not None:
        return difference.p_value
    value = difference.value
    return _implied(abs(value), value - difference.low if value > 0 else difference.high - value)


def unpaired_p_value(a: Estimate, b: Estimate) -> float:
    """A p-value for two values without their paired difference: below 0.05 where their 95 % intervals do not overlap.

    It is larger than that of the difference itself.
    """
    lower, upper = (a, b) if a.value <= b.value else (b, a)
    return _implied(upper.value - lower.value, (lower.high - lower.value) + (upper.value - upper.low))


def measured_alike(a: Measured, b: Measured) -> bool:
    """Whether two values of a metric compare: from as many samples, and by the same network where both records name it."""
    same_network = a.network is None or b.network is None or a.network == b.network
    return a.estimate.n == b.estimate.n and same_network


def _implied(distance: float, half_width: float) -> float:
    """The two-sided normal p-value of a distance from 0 whose 95 % half-width is this."""
    if half_width <= 0:
        return 1.0 if distance == 0 else 0.0
    return math.erfc(_QUANTILE * distance / half_width / math.sqrt(2))
