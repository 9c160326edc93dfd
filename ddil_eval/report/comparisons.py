"""Which differences of a table are significant: one p-value for each comparison, corrected for their number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric
from ddil_eval.report.table import Cell

LEVEL = 0.05
"""What is marked as significant has a corrected p-value below it."""

MARKED = (
    f"A star marks what differs from 0 at the {LEVEL:.0%} level after Holm's correction for the table's {{}} tests; printed "
    "p-values and intervals are those before it."
)
BOLD = (
    f"In bold what is best in its column, and better than the next at the {LEVEL:.0%} level after Holm's correction for the "
    "number of columns."
)
"""What captions say of stars, with the number of tests, and of bold."""

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


def corrected_p_values(cells: Sequence[Sequence[Cell]]) -> dict[tuple[int, int], float]:
    """The p-value of each sound difference of a table, by (row, column), corrected as one family."""
    tested = {
        (r, c): cell for r, row in enumerate(cells) for c, cell in enumerate(row) if isinstance(cell, RecordedEstimate)
    }
    return holm({place: p_value(cell) for place, cell in tested.items() if is_sound(cell)})


def best_and_p_value(
    values: Sequence[tuple[str, RecordedMetric]], metric: str, records: Sequence[Record]
) -> tuple[int, float] | None:
    """The place of the best of several systems' values of a metric, and the p-value of its difference to the next best.

    Two systems of one protocol have their paired difference among ``records``; of others, intervals that do not overlap say
    it, which asks for more than the test does. None where there are not two, or where they do not compare: not all measured
    alike, or one of them not sound.
    """
    found = [value for _, value in values]
    alike = all(measured_alike(a, b) for a, b in itertools.combinations(found, 2))
    if len(found) < 2 or not alike or not all(is_sound(value.estimate) for value in found):
        return None
    sign = -1 if found[0].direction == "higher" else 1
    best, second = sorted(range(len(found)), key=lambda place: sign * found[place].estimate.value)[:2]
    names = [name for name, _ in values]
    pair = {names[place]: found[place] for place in (best, second)}
    alone = names.count(names[best]) == names.count(names[second]) == 1  # else it may be another pair's difference
    paired = paired_difference(records, metric, pair) if alone else None
    if paired is not None:
        return best, p_value(paired)
    return best, unpaired_p_value(found[best].estimate, found[second].estimate)


def paired_difference(
    records: Iterable[Record], metric: str, pair: Mapping[str, RecordedMetric]
) -> RecordedEstimate | None:
    """The paired difference between two systems in a metric, where it was measured, either way round, on these very values."""
    a, b = (one.estimate.value for one in pair.values())
    for record in records:
        of = record.cell.get("of") if record.kind in ("difference", "pair") else None
        if isinstance(of, list) and set(map(str, of)) == set(pair) and metric in record.metrics:
            found = record.metrics[metric].estimate
            if is_sound(found) and math.isclose(abs(found.value), abs(a - b), rel_tol=1e-6, abs_tol=1e-9):
                return found
    return None


def is_sound(estimate: RecordedEstimate) -> bool:
    """Whether an estimate may be compared with another: its numbers are finite, and no note says to distrust it."""
    return estimate.note is None and all(map(math.isfinite, (estimate.value, estimate.low, estimate.high)))


def p_value(difference: RecordedEstimate) -> float:
    """The p-value of a difference; where it has none, the one that its 95 % interval implies, below 0.05 where that excludes 0."""
    if difference.p_value is not None:
        return difference.p_value
    value = difference.value
    return _implied(abs(value), value - difference.low if value > 0 else difference.high - value)


def unpaired_p_value(a: RecordedEstimate, b: RecordedEstimate) -> float:
    """A p-value for two values without their paired difference: below 0.05 where their 95 % intervals do not overlap.

    It is larger than that of the difference itself.
    """
    lower, upper = (a, b) if a.value <= b.value else (b, a)
    return _implied(upper.value - lower.value, (lower.high - lower.value) + (upper.value - upper.low))


def measured_alike(a: RecordedMetric, b: RecordedMetric) -> bool:
    """Whether two values of a metric compare: from as many samples, and by the same network where both records name it."""
    same_network = a.network is None or b.network is None or a.network == b.network
    return a.estimate.n == b.estimate.n and same_network


def _implied(distance: float, half_width: float) -> float:
    """The two-sided normal p-value of a distance from 0 whose 95 % half-width is this."""
    if half_width <= 0:
        return 1.0 if distance == 0 else 0.0
    return math.erfc(_QUANTILE * distance / half_width / math.sqrt(2))
