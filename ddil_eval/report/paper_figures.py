"""The report's figures for a paper, as PDF and PNG: quality against cost, shift curves, effects and drift.

An addition is one function and one row of ``DRAWN``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ddil_core.support.image_grids import save_figure
from ddil_eval.report import drift_figure, figures
from ddil_eval.report.figures import LARGEST, MIXED, TEACHER, legend_below
from ddil_eval.report.front import front
from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.rendering import header_text
from ddil_eval.report.table_type import Column, Table
from ddil_eval.report.tables import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".pdf", ".png")
_DPI = 200
_GREY = "#999999"


def draw_all(groups: Sequence[Group], tables: Sequence[Table], out: Path) -> list[Path]:
    """Draw every figure of the groups of records, and return the files ``out/GROUP/NAME.pdf`` and ``.png``.

    Args:
        groups: The groups (see ``tables.groups``).
        tables: Their tables (see ``tables.build``).
        out: The folder.

    Raises:
        DdilError: A value is too large, or a file cannot be written.
    """
    files = []
    for group in groups:
        own = {table.name: table for table in tables if table.group == group.name}
        for name, draw in DRAWN.items():
            for suffix in SUFFIXES:
                path = draw(group, own, out / group.name / f"{name}{suffix}")
                files += [] if path is None else [path]
    return files


def _systems(group: Group, tables: dict[str, Table], path: Path) -> Path | None:
    """Draw each metric against the NFE. The front is in colour; systems of one NFE stand side by side."""
    table = next((tables[name] for name in ("systems", "table5") if name in tables), None)
    cost = None if table is None else next((k for k, c in enumerate(table.columns) if c.key == "nfe"), None)
    panels = [] if table is None else _metrics(table)
    if table is None or cost is None or not panels:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    for ax, (place, column) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = [
            (str(row[0]), float(nfe), cell)
            for row in table.rows
            if isinstance(cell := row[place], RecordedEstimate) and isinstance(nfe := row[cost], int | float)
        ]
        _front(ax, points, column)
        _finish(ax, column)
    return save_figure(figure, path, _DPI)


def _front(ax: Axes, points: Sequence[tuple[str, float, RecordedEstimate]], column: Column) -> None:
    """Draw systems (name, NFE, value). Those of the front have numbers, by rising NFE, and their names stand below."""
    leading = front([(nfe, cell) for _, nfe, cell in points], column.direction)
    costs = sorted({nfe for _, nfe, _ in points})
    most = max((sum(nfe == cost for _, nfe, _ in points) for cost in costs), default=1)
    taken = dict.fromkeys(costs, 0)
    line = []
    for index, (name, nfe, cell) in sorted(enumerate(points), key=lambda point: point[1][1]):
        here = sum(other == nfe for _, other, _ in points)
        x = costs.index(nfe) + (taken[nfe] - (here - 1) / 2) * 0.8 / most
        taken[nfe] += 1
        _bar(ax, x, cell, TEACHER if index in leading else _GREY, filled=True)
        if index in leading:
            line.append((x, cell.value))
            above = column.direction == "higher"  # what the front beats lies on its other side
            ax.annotate(
                f"{len(line)}", (x, cell.high if above else cell.low), (0, 4 if above else -4), ha="center",
                va="bottom" if above else "top", textcoords="offset points", fontsize=8,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            number: dict[str, Any] = {"marker": f"${len(line)}$", "color": "black", "markeredgewidth": 0}
            ax.plot([], [], " ", label=name, **number)
    ax.plot(*zip(*line, strict=True), color=TEACHER, linestyle=":", linewidth=1)
    ax.set_xticks(range(len(costs)), [f"{cost:g}" for cost in costs])
    ax.set_xlim(-0.6, len(costs) - 0.4)
    ax.set_xlabel("NFE")
    ax.margins(y=0.12)
    legend_below(ax, -0.16, columns=2)


def _shift(group: Group, tables: dict[str, Table], path: Path) -> Path | None:
    drawn = any(record.kind in figures.DRAWN and record.metrics for record in group.records)
    return figures.shift_curves(group.records, path) if group.experiment == "covariate-shift" and drawn else None


def _effects(group: Group, tables: dict[str, Table], path: Path) -> Path | None:
    """Draw the main effects above the interactions, with a column for each metric. Filled points are significant."""
    chosen = [tables[name] for name in ("main-effects", "interactions") if name in tables and tables[name].rows]
    panels = _metrics(chosen[0]) if chosen else []
    if not panels:
        return None
    heights = [len(table.rows) + 1 for table in chosen]
    figure = Figure(figsize=(3.6 * len(panels) + 1, 0.3 * sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(chosen), len(panels), squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for line, table in zip(axes, chosen, strict=True):
        for ax, (place, column) in zip(line, panels, strict=True):
            for r, row in enumerate(table.rows):
                if isinstance(cell := row[place], RecordedEstimate):
                    _bar(ax, r, cell, MIXED, filled=(r, place) in table.significant, across=True)
            ax.axvline(0, color=_GREY, linewidth=0.8)
            ax.set_yticks(range(len(table.rows)), [str(row[0]) for row in table.rows], parse_math=False)
            ax.set_ylim(len(table.rows) - 0.4, -0.6)
            _finish(ax, column if table is chosen[0] else None, across=True)
    return save_figure(figure, path, _DPI)


def _drift(group: Group, tables: dict[str, Table], path: Path) -> Path | None:
    return drift_figure.draw(group.records, path) if group.experiment == "drift" else None


DRAWN: dict[str, Callable[[Group, dict[str, Table], Path], Path | None]] = {
    "systems": _systems,
    "shift": _shift,
    "effects": _effects,
    "drift": _drift,
}
"""The figures by file name. A function returns None for a group that it does not draw."""


def _metrics(table: Table) -> list[tuple[int, Column]]:
    """Return the columns of metrics whose values can be drawn, by place."""
    cells = {place: [row[place] for row in table.rows] for place, column in enumerate(table.columns) if column.interval}
    return [
        (place, table.columns[place])
        for place, column in cells.items()
        if any(isinstance(cell, RecordedEstimate) for cell in column)
        and all(max(abs(c.low), abs(c.high)) < LARGEST for c in column if isinstance(c, RecordedEstimate))
    ]


def _bar(ax: Axes, place: float, cell: RecordedEstimate, colour: str, *, filled: bool, across: bool = False) -> None:
    """Draw a value with its interval, upright or across."""
    ends = [[cell.value - cell.low], [cell.high - cell.value]]
    x, y = ([cell.value], [place]) if across else ([place], [cell.value])
    ax.errorbar(
        x, y, yerr=None if across else ends, xerr=ends if across else None, fmt="o", color=colour, markersize=4.5,
        elinewidth=1.2, markerfacecolor=colour if filled else "white",
    )  # fmt: skip


def _finish(ax: Axes, column: Column | None, *, across: bool = False) -> None:
    if column is not None:
        ax.set_title(header_text(column), fontsize=9, parse_math=False)
    ax.tick_params(labelsize=8)
    ax.grid(axis="x" if across else "y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
