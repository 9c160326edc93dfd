"""The systems that no other system beats at the same or a lower cost."""

from __future__ import annotations

from collections.abc import Sequence

from ddil_eval.report.records import Direction


def front(points: Sequence[tuple[float, float]], direction: Direction | None) -> set[int]:
    """Return the indices of the points on the Pareto front.

    A point is on the front if each other point costs more or has a worse value. Of two equal points both are on it.

    Args:
        points: The (cost, value) of each system; a lower cost is better.
        direction: Which values are better; None counts as "lower".
    """
    sign = -1 if direction == "higher" else 1
    scored = [(cost, sign * value) for cost, value in points]
    return {
        index
        for index, (cost, value) in enumerate(scored)
        if not any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in scored)
    }
