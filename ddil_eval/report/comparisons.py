"""Which differences of a table are significant: one p-value for each comparison, corrected for the number of tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric
from ddil_eval.report.table_type import Cell

LEVEL = 0.05
"""A difference is significant if its corrected p-value is below this level."""

MARKED = (
    f"A star marks a difference from 0 at the {LEVEL:.0%} level after Holm's correction for the table's {{}}. "
    "Printed p-values and intervals are uncorrected."
)
BOLD = (
    f"Bold marks the best value of a column, if it is better than the second best at the {LEVEL:.0%} level after "
    "Holm's correction for the number of columns."
)
"""What captions say about stars (with the tests, as in "3 tests") and about bold."""

_QUANTILE = 1.959963984540054
Key = TypeVar("Key")


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Return the corrected p-values of one family of tests, by Holm's step-down method (1979).

    Tests with a corrected p-value below α contain a false positive with a probability of at most α.
    """
    corrected: dict[Key, float] = {}
    largest = 0.0
    for place, (key, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_value))
        corrected[key] = largest
    return corrected


def corrected_p_values(cells: Sequence[Sequence[Cell]]) -> dict[tuple[int, int], float]:
    """Return the p-value of each sound difference of a table by (row, column), corrected as one family."""
    tested = {
        (r, c): cell for r, row in enumerate(cells) for c, cell in enumerate(row) if isinstance(cell, RecordedEstimate)
    }
    return holm({place: p_value(cell) for place, cell in tested.items() if is_sound(cell)})


def best_and_p_value(
    values: Sequence[tuple[str, RecordedMetric]], metric: str, records: Sequence[Record]
) -> tuple[int, float] | None:
    """Return the index of the best value of a metric, and the p-value of its difference from the second best.

    The p-value comes from the paired difference of the two systems, if ``records`` holds it. Otherwise it comes from
    the two intervals, which is a stricter test. Return None for fewer than two values, for values that were not
    measured alike, and if one value is not sound.

    Args:
        values: The name and the value of each system.
        metric: The name of the metric.
        records: The records of the table.
    """
    names, metrics = [name for name, _ in values], [value for _, value in values]
    alike = all(measured_alike(a, b) for a, b in itertools.combinations(metrics, 2))
    if len(metrics) < 2 or not alike or not all(is_sound(value.estimate) for value in metrics):
        return None
    sign = -1 if metrics[0].direction == "higher" else 1
    best, second = sorted(range(len(metrics)), key=lambda place: sign * metrics[place].estimate.value)[:2]
    pair = {names[place]: metrics[place] for place in (best, second)}
    # two systems of one name have several differences, and the record does not say which one it holds
    unique = names.count(names[best]) == names.count(names[second]) == 1
    paired = paired_difference(records, metric, pair) if unique else None
    if paired is not None:
        return best, p_value(paired)
    return best, unpaired_p_value(metrics[best].estimate, metrics[second].estimate)


def paired_difference(
    records: Iterable[Record], metric: str, pair: Mapping[str, RecordedMetric]
) -> RecordedEstimate | None:
    """Return the recorded paired difference of two systems, in either order, if it belongs to exactly these values."""
    a, b = (measured.estimate.value for measured in pair.values())
    for record in records:
        of = record.cell.get("of") if record.kind in ("difference", "pair") else None
        if isinstance(of, list) and set(map(str, of)) == set(pair) and metric in record.metrics:
            difference = record.metrics[metric].estimate
            if is_sound(difference) and math.isclose(abs(difference.value), abs(a - b), rel_tol=1e-6, abs_tol=1e-9):
                return difference
    return None


def is_sound(estimate: RecordedEstimate) -> bool:
    """Whether an estimate may be compared: its numbers are finite, and no note says that it is not reliable."""
    return estimate.note is None and all(map(math.isfinite, (estimate.value, estimate.low, estimate.high)))


def p_value(difference: RecordedEstimate) -> float:
    """Return the recorded p-value of a difference, or else the p-value that its 95 % interval implies.

    The implied p-value is below 0.05 exactly if the interval excludes 0.
    """
    if difference.p_value is not None:
        return difference.p_value
    value = difference.value
    return _implied(abs(value), value - difference.low if value > 0 else difference.high - value)


def unpaired_p_value(a: RecordedEstimate, b: RecordedEstimate) -> float:
    """Return a p-value for two values without a paired difference: below 0.05 if their 95 % intervals do not overlap.

    It is larger than the p-value of the difference itself.
    """
    lower, upper = (a, b) if a.value <= b.value else (b, a)
    return _implied(upper.value - lower.value, (lower.high - lower.value) + (upper.value - upper.low))


def measured_alike(a: RecordedMetric, b: RecordedMetric) -> bool:
    """Whether two values have the same number of samples, and the same network if both records name one."""
    same_network = a.network is None or b.network is None or a.network == b.network
    return a.estimate.n == b.estimate.n and same_network


def _implied(distance: float, half_width: float) -> float:
    """Return the two-sided normal p-value of a distance from 0 with this 95 % half-width."""
    if half_width <= 0:
        return 1.0 if distance == 0 else 0.0
    return math.erfc(_QUANTILE * distance / half_width / math.sqrt(2))
