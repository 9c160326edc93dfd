"""The configuration of the aggregated dataset: the phases of Algorithm 2, and how states are collected."""

from __future__ import annotations

from pydantic import Field, field_validator

from ddil_core.support.protocol import Strict


class PhaseConfig(Strict):
    """A phase of a stage (Algorithm 2).

    Where a rollout has one actor (LCM, DMD2), a state comes from data with probability 1 − ``aggregated``, from a
    rollout of the teacher with ``aggregated`` · ``p_teacher``, and otherwise from a rollout of the student.

    Attributes:
        until: The share of the stage's updates at which the phase ends.
        aggregated: The share of aggregated states in a batch, as a mean over updates.
        p_teacher: The probability that the teacher acts in the rollouts of the phase.
    """

    until: float = Field(gt=0, le=1)
    aggregated: float = Field(ge=0, le=1)
    p_teacher: float = Field(ge=0, le=1)


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
