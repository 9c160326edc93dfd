"""The figure of the drift experiment: disagreement, its ratios, distances of states, and commitment, by transition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ddil_core.support.image_grids import save_figure
from ddil_eval.report.figures import draw_estimates
from ddil_eval.report.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA, TEACHER, STUDENT = "#444444", "#0072B2", "#D55E00"  # the palette of Okabe and Ito, for any colour vision
_SOURCES = (
    ("data", DATA, "s", "forward-diffused data"),
    ("teacher", TEACHER, "o", "the teacher's states"),
    ("student", STUDENT, "D", "the student's own states"),
)
_Curve = tuple[str, str, str, str]
_PANELS: tuple[tuple[str, str, list[_Curve]], ...] = (
    (
        "Disagreement with the teacher",
        "drift",
        [(f"disagreement_{kind}", colour, marker, label) for kind, colour, marker, label in _SOURCES],
    ),
    (
        "Covariate-shift ratio",
        "drift",
        [
            ("shift_ratio", DATA, "s", "own states / data"),
            ("rollout_ratio", TEACHER, "o", "own states / the teacher's states"),
        ],
    ),
    (
        "Kernel distance of the states",
        "drift-states",
        [
            ("mmd_data", DATA, "s", "own states, data"),
            ("mmd_teacher", TEACHER, "o", "own states, the teacher's states"),
        ],
    ),
    (
        "Distance of the trajectories",
        "drift-paths",
        [("distance", STUDENT, "D", "‖student − teacher‖ / ‖teacher‖, after the step")],
    ),
    (
        "Commitment to the end",
        "drift-paths",
        [
            ("commitment_teacher", TEACHER, "o", "the teacher"),
            ("commitment_student", STUDENT, "D", "the student"),
        ],
    ),
)
"""For each panel: the title, the kind of its records, and each curve's metric, colour, marker and label."""


def draw(records: Sequence[Record], path: Path) -> Path:
    """Draw the records of one student by the time of the transition, and return the file.

    Args:
        records: The records of ``drift`` for one student, of all kinds.
        path: The file.
    """
    figure = Figure(figsize=(3.4 * len(_PANELS), 4.0), layout="constrained")
    for ax, (title, kind, curves) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        ours = [record for record in records if record.kind == kind and record.cell["t"] != "all"]
        ours.sort(key=lambda record: -float(str(record.cell["t"])))
        for metric, colour, marker, label in curves:
            points = [(k, r.metrics[metric].estimate) for k, r in enumerate(ours) if metric in r.metrics]
            if points:
                draw_estimates(ax, points, colour, marker, label)
        _finish(ax, title, ours)
    return save_figure(figure, path, 150)


def _finish(ax: Axes, title: str, records: Sequence[Record]) -> None:
    """Add the title and the times; sampling runs to the right."""
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.set_xlabel("t (sampling runs to the right)")
    ax.set_xticks(np.arange(len(records)), [f"{float(str(record.cell['t'])):g}" for record in records])
    if title == "Covariate-shift ratio":
        ax.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    if "distance" in title.lower():
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.08)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
