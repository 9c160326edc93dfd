"""The systems that no other system beats at the same or a lower cost."""

from __future__ import annotations

from collections.abc import Sequence

from ddil_eval.report.comparisons import is_sound
from ddil_eval.report.records import Direction, RecordedEstimate


def front(points: Sequence[tuple[float, RecordedEstimate]], direction: Direction | None) -> set[int]:
    """Return the indices of the points on the Pareto front.

    A point is on the front if each other point costs more or has a worse value. Of two equal points both are on it.
    A value that is not reliable (``comparisons.is_sound``) is not on the front, and keeps no other off it.

    Args:
        points: The cost and the value of each system; a lower cost is better.
        direction: Which values are better; None counts as "lower".
    """
    sign = -1 if direction == "higher" else 1
    scored = {k: (cost, sign * estimate.value) for k, (cost, estimate) in enumerate(points) if is_sound(estimate)}
    return {
        index
        for index, (cost, value) in scored.items()
        if not any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in scored.values())
    }
