"""What a figure of the drift experiment shows: its panels and their curves, for files and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Actor = Literal["teacher", "student", "mixed"]
"""Whose curve it is. It decides the colour and the mark."""


@dataclass(frozen=True)
class DriftCurve:
    """A curve over the transitions."""

    metric: str
    label: str
    actor: Actor


@dataclass(frozen=True)
class DriftPanel:
    """A panel.

    Attributes:
        title: The title.
        table: The table of its metrics, which is also the kind of their records.
        note: What it shows, in a sentence.
        curves: The curves.
    """

    title: str
    table: str
    note: str
    curves: tuple[DriftCurve, ...]


RATIOS = "Covariate-shift ratio"
"""The title of the panel in which 1 is no covariate shift."""

PANELS = (
    DriftPanel(
        "Disagreement with the teacher",
        "drift",
        "How far the student's predictions are from the teacher's, on states of three sources.",
        (
            DriftCurve("disagreement_data", "forward-diffused data", "mixed"),
            DriftCurve("disagreement_teacher", "the teacher's states", "teacher"),
            DriftCurve("disagreement_student", "the student's own states", "student"),
        ),
    ),
    DriftPanel(
        RATIOS,
        "drift",
        "The disagreement on the student's own states, divided by that on other states. 1 is no covariate shift.",
        (
            DriftCurve("shift_ratio", "own states / data", "mixed"),
            DriftCurve("rollout_ratio", "own states / the teacher's states", "teacher"),
        ),
    ),
    DriftPanel(
        "Kernel distance of the states",
        "drift-states",
        "How far the distribution of the student's states is from that of other states.",
        (
            DriftCurve("mmd_data", "own states, data", "mixed"),
            DriftCurve("mmd_teacher", "own states, the teacher's states", "teacher"),
        ),
    ),
    DriftPanel(
        "Distance of the trajectories",
        "drift-paths",
        "‖student − teacher‖ / ‖teacher‖ after each step, from the same noise.",
        (DriftCurve("distance", "student and teacher", "student"),),
    ),
    DriftPanel(
        "Commitment to the end",
        "drift-paths",
        "The share of the end's variance that the prediction x̂ explains before each step.",
        (
            DriftCurve("commitment_teacher", "the teacher", "teacher"),
            DriftCurve("commitment_student", "the student", "student"),
        ),
    ),
)
"""The panels in order."""
