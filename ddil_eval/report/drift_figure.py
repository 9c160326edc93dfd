"""The figure of the drift experiment: disagreement, its ratios, distances of states, and commitment, by transition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ddil_core.support.image_grids import save_figure
from ddil_eval.report.drift_panels import PANELS, RATIOS
from ddil_eval.report.figures import MIXED, STUDENT, TEACHER, draw_estimates
from ddil_eval.report.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = {"mixed": (MIXED, "s"), "teacher": (TEACHER, "o"), "student": (STUDENT, "D")}
"""The colour and the marker of each actor's curve."""


def draw(records: Sequence[Record], path: Path) -> Path:
    """Draw the records of one student by the time of the transition, and return the file.

    Args:
        records: The records of ``drift`` for one student, of all kinds.
        path: The file.
    """
    figure = Figure(figsize=(3.4 * len(PANELS), 4.0), layout="constrained")
    for ax, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        ours = [record for record in records if record.kind == panel.table and record.cell["t"] != "all"]
        ours.sort(key=lambda record: -float(str(record.cell["t"])))
        for curve in panel.curves:
            points = [(k, r.metrics[curve.metric].estimate) for k, r in enumerate(ours) if curve.metric in r.metrics]
            if points:
                draw_estimates(ax, points, *_LOOKS[curve.actor], curve.label)
        _finish(ax, panel.title, ours)
    return save_figure(figure, path, 150)


def _finish(ax: Axes, title: str, records: Sequence[Record]) -> None:
    """Add the title and the times; sampling runs to the right."""
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.set_xlabel("t (sampling runs to the right)")
    ax.set_xticks(np.arange(len(records)), [f"{float(str(record.cell['t'])):g}" for record in records])
    if title == RATIOS:
        ax.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    if "distance" in title.lower():
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.08)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
