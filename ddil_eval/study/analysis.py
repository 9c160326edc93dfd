"""The analysis of a study: what each source of states changes against the baseline, paired by seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddil_eval.report.comparisons import holm
from ddil_eval.report.records import Direction
from ddil_eval.statistics.estimate import Estimate
from ddil_eval.statistics.paired import paired_difference
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.matrix import Cell, Condition, Unit
from ddil_eval.study.measures import direction_of
from ddil_eval.study.records import UnitRecord

DIFFICULTY = "end_distance"
"""The baseline's value of this measure is the difficulty of a condition: how far its student ends from its teacher."""

SHARE = "share"
"""The axis of the share of aggregated states. Every other axis is the name of a factor."""
FEWEST = 3
"""The fewest values of an axis that a curve is drawn over."""


@dataclass(frozen=True)
class Place:
    """Where students are compared: a condition, and the number of their steps."""

    condition: Condition
    steps: int

    def words(self, methods: bool = True) -> str:
        """Return the place in words, with or without the method."""
        named = self.condition.words(methods)
        return f"{named}{', ' * bool(named)}{self.steps} step{'s' * (self.steps > 1)}"


@dataclass(frozen=True)
class Effect:
    """What a source changes in a measure against the baseline.

    Attributes:
        place: Where.
        source: The source of states.
        share: The share of aggregated states, or None.
        measure: The name of the measure.
        estimate: The mean over seeds of the paired difference, with its interval and p-value. Where ``relative``, of
            the difference of logarithms.
        relative: Whether the measure is compared on the log scale.
        direction: Which values of the measure are better.
        difficulty: The baseline's end distance at this place, or None.
        baseline: The mean of the baseline's values.
        p_holm: The p-value, corrected for all tests of the study; None for a measure that is not tested.
    """

    place: Place
    source: str
    share: float | None
    measure: str
    estimate: Estimate
    relative: bool
    direction: Direction
    difficulty: float | None
    baseline: float
    p_holm: float | None = None

    @property
    def change(self) -> tuple[float, float, float]:
        """The change with the ends of its interval: relative to the baseline, or plain."""
        numbers = (self.estimate.value, self.estimate.low, self.estimate.high)
        value, low, high = (float(np.expm1(number)) if self.relative else number for number in numbers)
        return value, low, high

    @property
    def better(self) -> bool:
        """Whether the values are better than the baseline's."""
        return (self.estimate.value < 0) == (self.direction == "lower")

    def significant(self, level: float) -> bool:
        """Whether the corrected p-value is below a level."""
        return self.p_holm is not None and self.p_holm < level


Values = dict[tuple[Place, str, float | None, str], dict[int, float]]
"""The values of each place, source, share and measure, by seed."""


def values_of(done: Mapping[Unit, UnitRecord]) -> Values:
    """Return all measured values."""
    values: Values = {}
    for unit, record in done.items():
        cell = unit.cell
        for steps, measures in record.students.items():
            for name, value in measures.items():
                key = Place(cell.condition, steps), cell.source, cell.share, name
                values.setdefault(key, {})[unit.seed] = value
    return values


def effects_of(config: StudyConfig, done: Mapping[Unit, UnitRecord]) -> list[Effect]:
    """Return all effects. The p-values of the tested measures are corrected together, by Holm's method.

    A measure is compared on the log scale where less of it is better and all of its values in the study are positive.
    """
    values = values_of(done)
    relative = {name: _is_relative(name, values) for *_, name in values}
    found = list(_uncorrected(config, values, relative))
    tests = {i: p for i, effect in enumerate(found) if (p := effect.estimate.p_value) is not None}
    corrected = holm(tests)
    return [replace(effect, p_holm=corrected.get(i)) for i, effect in enumerate(found)]


def _uncorrected(config: StudyConfig, values: Values, relative: Mapping[str, bool]) -> Iterator[Effect]:
    for (place, source, share, measure), theirs in values.items():
        base = values.get((place, config.baseline, None, measure), {})
        seeds = sorted(theirs.keys() & base.keys())
        if source == config.baseline or len(seeds) < 2:
            continue
        pairs = np.array([[theirs[seed], base[seed]] for seed in seeds])
        pairs = np.log(pairs) if relative[measure] else pairs
        difficulty = values.get((place, config.baseline, None, DIFFICULTY))
        estimate = paired_difference(pairs[:, 0] - pairs[:, 1])
        yield Effect(
            place,
            source,
            share,
            measure,
            estimate if measure in config.measure.tested else replace(estimate, p_value=None),
            relative[measure],
            direction_of(measure),
            None if difficulty is None else _mean(difficulty),
            _mean(base),
        )


def _is_relative(measure: str, values: Values) -> bool:
    positive = all(value > 0 for key, column in values.items() if key[-1] == measure for value in column.values())
    return positive and direction_of(measure) == "lower"


def _mean(column: Mapping[int, float]) -> float:
    return float(np.mean(list(column.values())))


def is_drawn(config: StudyConfig, effects: Sequence[Effect]) -> bool:
    """Whether the figure has something to show: a tested effect with a difficulty."""
    return any(e.measure in config.measure.tested and e.difficulty is not None for e in effects)


def axes_of(config: StudyConfig, effects: Sequence[Effect]) -> list[str]:
    """Return what tested effects are drawn over: the share, and factors by name, of at least three numbers each."""
    if not any(effect.measure in config.measure.tested for effect in effects):
        return []
    numbers = {SHARE: config.shares} | {
        name: values
        for name, values in config.factors.items()
        if not isinstance(values, dict)
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    }
    return [name for name, values in numbers.items() if len(values) >= FEWEST]


def rank_correlations(config: StudyConfig, effects: Sequence[Effect]) -> dict[tuple[str, str], tuple[float, int]]:
    """Return how the effects on tested measures go with the effects on other measures, over all places and sources.

    Returns:
        Spearman's rank correlation and the number of cells, by the tested measure and the other one. Cells of one
        place share their baseline, so the correlations describe and do not test.
    """
    from scipy.stats import spearmanr

    by_cell: dict[str, dict[tuple[Place, str, float | None], float]] = {}
    for effect in effects:
        cell = effect.place, effect.source, effect.share
        by_cell.setdefault(effect.measure, {})[cell] = effect.estimate.value
    found = {}
    for tested in (name for name in config.measure.tested if name in by_cell):
        for other in (name for name in by_cell if name != tested):
            cells = sorted(by_cell[tested].keys() & by_cell[other].keys(), key=str)
            pair = [[by_cell[name][cell] for cell in cells] for name in (tested, other)]
            if len(cells) > 2 and all(len(set(column)) > 1 for column in pair):
                found[tested, other] = float(spearmanr(*pair).statistic), len(cells)
    return found


def cost_of(done: Mapping[Unit, UnitRecord]) -> dict[Cell, float]:
    """Return the mean teacher evaluations of a unit of each cell, where they are counted."""
    counted: dict[Cell, list[int]] = {}
    for unit, record in done.items():
        if record.teacher_nfe is not None:
            counted.setdefault(unit.cell, []).append(record.teacher_nfe)
    return {cell: float(np.mean(numbers)) for cell, numbers in counted.items()}
