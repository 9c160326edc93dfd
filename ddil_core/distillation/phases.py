"""The configuration of the aggregated dataset: the phases of Algorithm 2, and how states are collected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, field_validator

from ddil_core.support.protocol import Strict

Probability = Annotated[float, Field(ge=0, le=1)]


class Line(Strict):
    """A number that moves in a straight line over a phase.

    Attributes:
        start: The number at the first update of the phase.
        end: The number at its last update.
    """

    start: Probability
    end: Probability

    def at(self, place: float) -> float:
        """Return the number at a place from 0, the first update, to 1, the last."""
        return self.start + (self.end - self.start) * place

    def __mul__(self, factor: float) -> Line:
        """Return the line with both ends multiplied by a factor, as a study does with its shares."""
        return self.model_copy(update={"start": self.start * factor, "end": self.end * factor})


Curve = Probability | Line
"""A number that stays, or one that moves over a phase."""


def curve_bounds(curve: float | Line) -> tuple[float, float]:
    """Return the least and the greatest number of a curve."""
    return (min(curve.start, curve.end), max(curve.start, curve.end)) if isinstance(curve, Line) else (curve, curve)


def curve_mean(curve: float | Line, batches: Iterable[int], first: int, end: int) -> float:
    """Return the mean of a curve over some batches of a phase that goes from batch ``first`` to before batch ``end``.

    The first batch has the curve's start and the last its end. A phase of one batch has the mean of both. So the mean
    over the whole phase is (start + end)/2.
    """
    if not isinstance(curve, Line):
        return curve
    last = end - 1 - first
    values = [curve.at((batch - first) / last if last else 0.5) for batch in batches]
    return sum(values) / len(values)


class PhaseConfig(Strict):
    """A phase of a stage (Algorithm 2).

    Where a rollout has one actor (LCM, TCD, DMD2), a state comes from data with probability 1 − ``aggregated``, from a
    rollout of the teacher with ``aggregated`` · ``p_teacher``, and otherwise from a rollout of the student.

    Attributes:
        until: The share of the stage's updates at which the phase ends.
        aggregated: The share of aggregated states in a batch, as a mean over updates. A mapping such as ``{start: 0,
            end: 1}`` lets it move over the phase.
        p_teacher: The probability that the teacher acts in the rollouts of the phase. It may move likewise. A
            collection then takes the mean over the batches that it serves.
    """

    until: float = Field(gt=0, le=1)
    aggregated: Curve
    p_teacher: Curve


PAPER_PHASES = (
    PhaseConfig(until=0.6, aggregated=0.25, p_teacher=0.85),
    PhaseConfig(until=1.0, aggregated=0.5, p_teacher=0.2),
)
"""The phases of Algorithm 2: the student acts with probability 0.15 in 6,000 updates, and 0.80 in the next 4,000."""


class DdilConfig(Strict):
    """The aggregated dataset. ``ddil: {}`` has the phases of the paper (Algorithm 2).

    Attributes:
        uses: How often a state is used.
        collect_every: How many batches one collection serves.
        capacity: The most states that the dataset holds.
        phases: The phases of every stage, in order. Their ``until`` rises and ends at 1.
    """

    uses: int = Field(default=1, ge=1)
    collect_every: int = Field(default=50, ge=1)
    capacity: int = Field(default=8192, ge=1)
    phases: tuple[PhaseConfig, ...] = PAPER_PHASES

    @field_validator("phases")
    @classmethod
    def _phases_end_at_one(cls, phases: tuple[PhaseConfig, ...]) -> tuple[PhaseConfig, ...]:
        ends = [phase.until for phase in phases]
        if not ends or ends[-1] != 1 or ends != sorted(set(ends)):
            raise ValueError("the 'until' of the phases must rise and end at 1")
        return phases
