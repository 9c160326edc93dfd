"""The figure of the drift experiment by transition: of one student, or of groups of students."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ddil_core.support.image_grids import save_figure
from ddil_eval.report.drift_panels import FilledPanel, Look, filled_panels
from ddil_eval.report.figures import MIXED, STUDENT, TEACHER, draw_estimates, legend_below
from ddil_eval.report.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS: dict[Look, tuple[str, str]] = {
    "mixed": (MIXED, "s"),
    "student": (STUDENT, "D"),
    "teacher": (TEACHER, "o"),
    "fourth": ("#009E73", "^"),
    "fifth": ("#AA4499", "v"),
}
"""The colour and the marker of each look."""
_APART = 0.1
"""How far apart curves stand at a transition, so that their intervals do not hide one another."""


def draw(records: Sequence[Record], path: Path) -> Path | None:
    """Draw records by the time of the transition, and return the file; None where there is nothing to draw.

    Args:
        records: The records of ``drift`` for one student, or for groups of students on one grid, of all kinds.
        path: The file.
    """
    panels = filled_panels(records)
    if not panels:
        return None
    width = max(3.4, *(0.42 * len(filled.times) for filled in panels))
    figure = Figure(figsize=(width * len(panels), 4.0), layout="constrained")
    for ax, filled in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (curve, points) in enumerate(filled.curves):
            shift = _APART * (number - (len(filled.curves) - 1) / 2)
            beside = [(place + shift, estimate) for place, estimate in points]
            draw_estimates(ax, beside, *_LOOKS[curve.look], curve.label)
        _finish(ax, filled)
    return save_figure(figure, path, 150)


def _finish(ax: Axes, filled: FilledPanel) -> None:
    """Add the title and the times; sampling runs to the right."""
    title, level = filled.panel.title, filled.panel.level
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.set_xlabel("t (sampling runs to the right)")
    ax.set_xticks(range(len(filled.times)), filled.times, fontsize=8)
    if level is not None:
        ax.axhline(level, color="#999999", linewidth=0.8, linestyle=":")
    if "distance" in title.lower():
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.08)
    legend_below(ax, -0.2)
