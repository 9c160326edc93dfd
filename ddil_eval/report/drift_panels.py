"""What a figure of the drift experiment shows: its panels and their curves, for files and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ddil_eval.report.records import Record, RecordedEstimate

Look = Literal["mixed", "student", "teacher", "fourth", "fifth"]
"""The colour and the mark of a curve: of whose curve it is, or of one group of students among others."""
_LOOKS: tuple[Look, ...] = ("mixed", "student", "fourth", "fifth", "teacher")
"""The looks of groups, in the order of their names. A panel has at most one curve of each look."""


@dataclass(frozen=True)
class DriftCurve:
    """A curve over the transitions: of one student, or of the group of students with this name."""

    metric: str
    label: str
    look: Look
    group: str | None = None


@dataclass(frozen=True)
class DriftPanel:
    """A panel.

    Attributes:
        title: The title.
        table: The table of its metrics, which is also the kind of their records.
        note: What it shows, in a sentence.
        curves: The curves.
        level: A value that a line marks.
    """

    title: str
    table: str
    note: str
    curves: tuple[DriftCurve, ...]
    level: float | None = None


@dataclass(frozen=True)
class FilledPanel:
    """A panel with its values.

    Attributes:
        panel: The panel.
        times: The times at which transitions start, falling, in print.
        curves: The curves that have values, each with the place of each value in ``times``.
    """

    panel: DriftPanel
    times: tuple[str, ...]
    curves: tuple[tuple[DriftCurve, tuple[tuple[int, RecordedEstimate], ...]], ...]


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
        "Covariate-shift ratio",
        "drift",
        "The disagreement on the student's own states, divided by that on other states. 1 is no covariate shift.",
        (
            DriftCurve("shift_ratio", "own states / data", "mixed"),
            DriftCurve("rollout_ratio", "own states / the teacher's states", "teacher"),
        ),
        level=1.0,
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
"""The panels of one student, in order."""


def filled_panels(records: Iterable[Record]) -> list[FilledPanel]:
    """Return the panels that records of the drift experiment have values for: of one student, then of groups.

    Args:
        records: The records of one student, or of groups on one grid, in any order and of any kinds.
    """
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        if "t" in record.cell and record.cell["t"] != "all":
            by_kind.setdefault(record.kind, []).append(record)
    groups = sorted({str(record.cell["name"]) for record in by_kind.get("drift-group", [])})
    filled = [_fill(panel, by_kind.get(panel.table, [])) for panel in (*PANELS, *_panels_of(groups))]
    return [panel for panel in filled if panel.curves]


def _panels_of(groups: Sequence[str]) -> list[DriftPanel]:
    """Return the panels of groups of students. More groups than looks have further panels."""
    some = [groups[first : first + len(_LOOKS)] for first in range(0, len(groups), len(_LOOKS))]
    return [
        DriftPanel(
            title, "drift-group", note, tuple(map(DriftCurve, [metric] * len(names), names, _LOOKS, names)), level
        )
        for title, metric, note, level in _GROUPED
        for names in some
    ]


_GROUPED = (
    (
        "Covariate-shift ratio",
        "shift_ratio",
        "The disagreement on the students' own states, divided by that on data. 1 is no covariate shift.",
        1.0,
    ),
    (
        "Disagreement on own states",
        "disagreement_student",
        "How far the students' predictions are from the teacher's, on the states that they reach themselves.",
        None,
    ),
)
"""The panels of groups, whose curves are means over training seeds: title, metric, note, and the value with a line."""


def _fill(panel: DriftPanel, records: Sequence[Record]) -> FilledPanel:
    times = sorted({_time(record) for record in records}, reverse=True)
    curves = []
    for curve in panel.curves:
        points = {
            times.index(_time(record)): record.metrics[curve.metric].estimate
            for record in records
            if curve.metric in record.metrics and record.cell.get("name") == curve.group
        }
        if points:
            curves.append((curve, tuple(sorted(points.items()))))
    short = tuple(f"{time:.4g}" for time in times)
    return FilledPanel(panel, short if len(set(short)) == len(times) else tuple(map(str, times)), tuple(curves))


def _time(record: Record) -> float:
    return float(str(record.cell["t"]))
