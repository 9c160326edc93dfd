"""Figures: a grid of images (Figure 2) and the covariate-shift curves. A file is written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from ddil_core.support.errors import DdilError
from ddil_core.support.files import replacing
from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

DPI = 100  # of image grids: one dot is one pixel
MARGIN = 12  # pixels, around and between the parts
SIDE = 200  # pixels, for row labels
LINE = 1.35  # line height in font heights
FONT = 10  # points
TEACHER, STUDENT, MIXED = "#0072B2", "#D55E00", "#444444"  # the palette of Okabe and Ito, for any colour vision
LARGEST = 1e100  # the largest value of a curve: matplotlib overflows near the largest float
DRAWN = ("p_teacher", "pure", "teacher_then_student", "student_then_teacher")
"""The kinds of cells that the curves show."""
_ARROWS = {"lower": "lower is better", "higher": "higher is better"}


def image_grid(
    images: NDArray[np.uint8],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    path: Path | str,
    *,
    cell: int = 160,
) -> Path:
    """Draw images in rows and columns with labels, and return the file.

    Args:
        images: uint8 [R, C, H, W, 3].
        row_labels: R labels, wrapped at the left of the rows.
        column_labels: C labels, above the columns.
        path: The file.
        cell: Smaller images are enlarged by a whole factor, to at most this many pixels.

    Raises:
        ValueError: The shapes or the type are others.
        DdilError: The file cannot be written.
    """
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[4] != 3:
        raise ValueError(f"images must be uint8 [R, C, H, W, 3], not {images.dtype} {list(images.shape)}")
    if images.shape[:2] != (len(row_labels), len(column_labels)):
        raise ValueError(f"{list(images.shape[:2])} images do not fit {len(row_labels)} × {len(column_labels)} labels")
    factor = max(1, cell // max(images.shape[2:4]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = images.shape[2:4]

    side = max([SIDE, *(_longest_word(label) + MARGIN for label in row_labels)]) if any(row_labels) else 0
    wide = max([width, *map(_longest_word, column_labels)])
    left = [_wrap(label, side - MARGIN) for label in row_labels]
    top = [_wrap(label, wide) for label in column_labels]
    heights = [max(height, _pixels(label)) for label in left]
    xs = _starts(MARGIN + side, [wide] * len(top))
    ys = _starts(2 * MARGIN + max(map(_pixels, top)), heights)

    canvas = np.full((ys.pop(), xs.pop(), 3), 255, np.uint8)
    for r, c in np.ndindex(len(left), len(top)):
        x, y = xs[c] + (wide - width) // 2, ys[r] + (heights[r] - height) // 2
        canvas[y : y + height, x : x + width] = images[r, c]
    captions = [(x + wide / 2, ys[0] - MARGIN / 2, text, "center", "bottom") for x, text in zip(xs, top, strict=True)]
    captions += [(side, y + tall / 2, text, "right", "center") for y, tall, text in zip(ys, heights, left, strict=True)]
    return _save(_annotated(canvas, captions), Path(path), DPI)


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
    return _save(figure, Path(path), 150)


def _curve(ax: Axes, records: Sequence[Record], name: str, kind: str, colour: str, marker: str, label: str) -> None:
    key = "p_teacher" if kind == "p_teacher" else "switch_t"
    points = sorted(
        (float(str(r.cell[key])), r.metrics[name].estimate) for r in records if r.kind == kind and name in r.metrics
    )
    if points:
        x, estimates = zip(*points, strict=True)
        ax.errorbar(
            x, [e.value for e in estimates], yerr=_bars(estimates), color=colour, marker=marker, label=label,
            markersize=5, linewidth=1.4, elinewidth=1.1, capsize=3,
        )  # fmt: skip


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


def _bars(estimates: Sequence[RecordedEstimate]) -> list[list[float]]:
    return [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]


def _starts(first: int, sizes: Sequence[int]) -> list[int]:
    """Return where parts of these sizes start, with margins between them, and where a further part would start."""
    return [first + sum(sizes[:i]) + i * MARGIN for i in range(len(sizes) + 1)]


def _annotated(canvas: NDArray[np.uint8], captions: Sequence[tuple[float, float, str, str, str]]) -> Figure:
    """Return a figure of the unchanged pixels, with text at (x, y) pixels from the upper left."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas, origin="upper")
    for x, y, text, ha, va in captions:
        figure.text(x / width, 1 - y / height, text, ha=ha, va=va, fontsize=FONT, linespacing=LINE, parse_math=False)
    return figure


def _wrap(text: str, width: int) -> str:
    """Break text between words into lines of at most `width` pixels. A longer word gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _width(text: str) -> float:
    """Return the width of drawn text in pixels."""
    return RendererAgg(1, 1, DPI).get_text_width_height_descent(text, FontProperties(size=FONT), False)[0]


def _longest_word(text: str) -> int:
    return max((int(np.ceil(_width(word))) for word in text.split()), default=0)


def _pixels(text: str) -> int:
    """Return the height of wrapped text in pixels."""
    return int(np.ceil((text.count("\n") + 1) * FONT * LINE * DPI / 72))


def _save(figure: Figure, path: Path, dpi: int) -> Path:
    with replacing(path) as temporary:
        # no software version in the file: the same figure is the same bytes
        FigureCanvasAgg(figure)  # draws without a display
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None} if path.suffix == ".png" else None)
    return path
