"""Figures: images of inverted prompts, and the covariate-shift curves. A file is written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ddil_core.support.errors import DdilError
from ddil_core.support.image_grids import image_grid, save_figure
from ddil_core.support.text import break_text, one_line
from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

TEACHER, STUDENT, MIXED = "#0072B2", "#D55E00", "#444444"  # the palette of Okabe and Ito, for any colour vision
LARGEST = 1e100  # the largest value of a curve: matplotlib overflows near the largest float
DRAWN = ("p_teacher", "pure", "teacher_then_student", "student_then_teacher")
"""The kinds of cells that the curves show."""
_ARROWS = {"lower": "lower is better", "higher": "higher is better"}


def inversion_figure(
    reference: NDArray[np.uint8],
    generated: Sequence[NDArray[np.uint8]],
    prompt: str,
    systems: Sequence[str],
    path: Path | str,
) -> Path:
    """Draw an inverted image beside the images that systems generate from its prompt, and return the file.

    Args:
        reference: The inverted image, uint8 [H, W, 3].
        generated: One image for each system, of the same shape.
        prompt: The prompt.
        systems: The names of the systems.
        path: The file.

    Raises:
        DdilError: The file cannot be written.
    """
    return image_grid(np.stack([reference, *generated])[None], [prompt], ["reference", *systems], path)


def shift_curves(records: Sequence[Record], path: Path | str) -> Path:
    """Draw every metric over p_teacher and over switch_t with 95 % intervals, and return the file.

    The figure has one column for each metric. Horizontal lines are the pure runs.

    Args:
        records: The records of one group of a covariate-shift analysis (see ``tables.groups``).
        path: The file.

    Raises:
        DdilError: There is nothing to draw, a value is too large, or the file cannot be written.
    """
    drawn = [r for r in records if r.kind in DRAWN]
    metrics = {name: metric for record in drawn for name, metric in record.metrics.items()}
    if not metrics:
        raise DdilError(
            f"No record of a covariate-shift analysis can be drawn in {path}: run `ddil eval covariate-shift` first."
        )
    for estimate in (metric.estimate for record in drawn for metric in record.metrics.values()):
        if max(abs(estimate.low), abs(estimate.high)) > LARGEST:
            raise DdilError(
                f"The value {estimate.value:g} is too large to draw in {path}: move its record away and measure again."
            )
    figure = Figure(figsize=(3.6 * len(metrics) + 0.4, 6.2), layout="constrained")
    axes = figure.subplots(2, len(metrics), squeeze=False, sharey="col")
    for column, (name, metric) in zip(axes.T, metrics.items(), strict=True):
        for ax in column:
            _pure_lines(ax, drawn, name)
        _curve(column[0], drawn, name, "p_teacher", MIXED, "s", "mixed at random")
        _curve(column[1], drawn, name, "teacher_then_student", TEACHER, "o", "teacher, then student")
        _curve(column[1], drawn, name, "student_then_teacher", STUDENT, "D", "student, then teacher")
        _finish(column, name, metric)
    handles = {
        label: handle for ax in axes[:, 0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(metrics) + 1), frameon=False
    )
    return save_figure(figure, Path(path), 150)


def _curve(ax: Axes, records: Sequence[Record], name: str, kind: str, colour: str, marker: str, label: str) -> None:
    key = "p_teacher" if kind == "p_teacher" else "switch_t"
    drawn = [
        (float(str(r.cell[key])), r.metrics[name].estimate) for r in records if r.kind == kind and name in r.metrics
    ]
    points = sorted(drawn, key=lambda point: point[0])
    if points:
        draw_estimates(ax, points, colour, marker, label)


def draw_estimates(
    ax: Axes, points: Sequence[tuple[float, RecordedEstimate]], colour: str, marker: str, label: str
) -> None:
    """Draw a curve through (x, estimate) with the intervals as bars."""
    x, estimates = zip(*points, strict=True)
    bars = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    ax.errorbar(
        x, [e.value for e in estimates], yerr=bars, color=colour, marker=marker, label=label,
        markersize=5, linewidth=1.4, elinewidth=1.1, capsize=3,
    )  # fmt: skip


def legend_below(ax: Axes, place: float, *, columns: int = 1) -> None:
    """Write the names of curves or points below the axes, in small print.

    Args:
        ax: The axes.
        place: The upper end of the legend, as a share of the height of the axes; negative below them.
        columns: The number of columns.
    """
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        names = [break_text(one_line(label), 28) for label in labels]
        legend = ax.legend(
            handles, names, frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, place), ncols=columns
        )
        for text in legend.get_texts():  # a name is no formula
            text.set_parse_math(False)


def _pure_lines(ax: Axes, records: Sequence[Record], name: str) -> None:
    for model, colour, style in (("teacher", TEACHER, "--"), ("student", STUDENT, ":")):
        for record in records:
            if record.kind == "pure" and record.cell["model"] == model and name in record.metrics:
                estimate = record.metrics[name].estimate
                ax.axhspan(estimate.low, estimate.high, color=colour, alpha=0.10, linewidth=0)
                ax.axhline(estimate.value, color=colour, linestyle=style, linewidth=1.2, label=f"{model} alone")


def _finish(column: Sequence[Axes], name: str, metric: RecordedMetric) -> None:
    """Add titles, and let the axes follow sampling: time falls to the right, and p_teacher rises."""
    column[0].set_title(f"{name}\n({_ARROWS[metric.direction]})", fontsize=10, parse_math=False)
    column[0].set_xlabel("p_teacher")
    column[1].set_xlabel("switch_t (sampling runs to the right)")
    column[1].invert_xaxis()
    for ax in column:
        ax.set_xticks(sorted({x for line in ax.containers for x in line[0].get_xdata()}))
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.08)
