"""Which charts a group of tables has. An addition is one function and one row of ``FIGURES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ddil_eval.report.drift_panels import filled_panels
from ddil_eval.report.front import front
from ddil_eval.report.page.charts import (
    LOOKS,
    MUTED,
    Axis,
    Chart,
    Curve,
    Point,
    cost_chart,
    curve_chart,
    forest_chart,
)
from ddil_eval.report.page.findings import group_name, place_name, row_name, told
from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.table_type import Table

Tables = Mapping[str, Table]
"""The tables of one group by name."""


def charts_of(tables: Tables, *, without: Callable[[Tables], list[Chart]] | None = None) -> list[Chart]:
    """Return the charts of a group of tables, in the order of ``FIGURES``; those of one function may be left out."""
    drawing = [draw for names, draw in FIGURES if any(name in tables for name in names) and draw is not without]
    return [chart for draw in drawing for chart in draw(tables)]


def quality_and_cost(tables: Tables) -> list[Chart]:
    """Return a chart of each metric against the NFE."""
    charts = []
    for table in _present(tables, "systems", "table5"):
        for place, column in told(table) if _has(table, "nfe") else []:
            costs = {r: row[_place(table, "nfe")] for r, row in enumerate(table.rows)}
            priced = [
                replace(point, x=float(cost))
                for r, point in _points(table, place).items()
                if isinstance(cost := costs[r], int | float)
            ]
            if priced:
                leading = front([(float(p.x), p.estimate) for p in priced], column.direction)
                marked = [replace(point, marked=k in leading) for k, point in enumerate(priced)]
                charts.append(cost_chart(column.header, column.direction, marked, COST))
    return charts


def differences(tables: Tables) -> list[Chart]:
    """Return a chart of each metric of the tables of differences and effects."""
    charts = []
    for name, header in DIFFERENCES.items():
        for table in _present(tables, name):
            for group in dict.fromkeys(group_name(table, r) for r in range(len(table.rows))):
                title = f"{table.title}, {group}" if group else table.title
                charts += _forests(table, header, f"{title}. {TESTED}", group=group, zero=True)
    return charts


def rows(tables: Tables) -> list[Chart]:
    """Return a chart of each metric for the systems and the inverters, below one another."""
    return _rows_of(tables, {"systems": "System", "table5": "System", "inverters": "Inverter"})


def strings(tables: Tables) -> list[Chart]:
    """Return a chart of each metric for the strings of a factorial, below one another."""
    return _rows_of(tables, {"strings": "String"})


def shift_curves(tables: Tables) -> list[Chart]:
    """Return each metric against p_teacher, then each against switch_t, with the pure runs as levels."""
    charts = []
    for (title, falling), drawn in SHIFT.items():
        columns = {column.key: column for name, *_ in drawn if name in tables for _, column in told(tables[name])}
        for metric, column in columns.items():
            curves = [curve for name, *look in drawn for curve in _curve(tables, name, metric, *look)]
            if curves:
                places = sorted({float(point.x) for curve in curves for point in curve.points})
                axis = Axis(title, places, numeric=True, falling=falling)
                curves += _levels(tables, metric)
                charts.append(curve_chart(column.header, column.direction, curves, axis, CURVES))
    return charts


def drift_curves(tables: Tables) -> list[Chart]:
    """Return the curves of a student or of groups of students by transition; sampling runs to the right."""
    charts = []
    for filled in filled_panels(record for table in tables.values() for record in table.records if record is not None):
        panel, drawn = filled.panel, list[Curve]()
        for curve, estimates in filled.curves:
            colour, shape = LOOKS[curve.look]
            points = [Point(curve.label, filled.times[place], estimate) for place, estimate in estimates]
            drawn.append(Curve(curve.label, colour, points, shape))
        axis = Axis("t (sampling runs to the right)", filled.times)
        charts.append(curve_chart(panel.title, None, drawn, axis, TRANSITIONS, panel.note, line=panel.level))
    return charts


COST = (
    "Each point is a system, with its 95 % interval, over the mean number of network evaluations for an image (NFE). "
    "The dashed line joins the systems that no other system beats at the same or a lower NFE. They have numbers, and "
    "their names stand below the chart; the others are grey."
)
ROWS = "Points with 95 % intervals. A filled point is the best value, significantly better than the second best."
TESTED = "Points with 95 % intervals. A filled point is significant after Holm's correction."
TRANSITIONS = "Each point is a transition, by the time t at which it starts. Bands are 95 % intervals."
CURVES = "Bands are 95 % intervals. Dashed lines are the teacher alone and the student alone."
SHIFT = {
    ("p_teacher", False): (("table2", "mixed at random", "mixed"),),
    ("switch_t (sampling runs to the right)", True): (
        ("table3", "teacher, then student", "teacher"),
        ("table4", "student, then teacher", "student"),
    ),
}
"""For each axis of the shift curves, and whether it falls to the right: the table, label and actor of each curve."""
DIFFERENCES = {
    "differences": "Difference",
    "inverter-differences": "Difference",
    "main-effects": "Transition",
    "interactions": "Transitions",
    "drift-ratios": "Transition",
    "drift-difference": "Transition",
    "drift-group-difference": "Transition",
}
"""The tables of differences and effects, each with the header of its rows."""

FIGURES: tuple[tuple[tuple[str, ...], Callable[[Tables], list[Chart]]], ...] = (
    (("systems", "table5"), quality_and_cost),
    (("systems", "table5", "inverters"), rows),
    (("table2", "table3", "table4"), shift_curves),
    (("drift", "drift-states", "drift-paths", "drift-group"), drift_curves),
    (tuple(DIFFERENCES), differences),
    (("strings",), strings),
)
"""The tables that a figure is drawn from, and the function that draws it. A group needs one of the tables."""


def _present(tables: Tables, *names: str) -> list[Table]:
    return [tables[name] for name in names if name in tables]


def _has(table: Table, key: str) -> bool:
    return any(column.key == key for column in table.columns)


def _place(table: Table, key: str) -> int:
    return next(place for place, column in enumerate(table.columns) if column.key == key)


def _points(table: Table, place: int) -> dict[int, Point]:
    """Return the estimates of a column by row. Rows are named; equal names are told apart."""
    names, points = list[str](), dict[int, Point]()
    for r, row in enumerate(table.rows):
        name = row_name(table, r)
        names.append(name)
        cell = row[place]
        if isinstance(cell, RecordedEstimate):
            label = name if names.count(name) == 1 else f"{name} ({names.count(name)})"
            marked = (r, place) in table.significant or (r, place) in table.best
            points[r] = Point(label, name, cell, marked)
    return points


def _forests(table: Table, header: str, text: str, *, group: str = "", zero: bool = False) -> list[Chart]:
    """Return a chart of each metric for the rows of a group, which are named without it."""
    charts = []
    for place, column in told(table):
        points = [
            replace(point, name=place_name(table, r)) if group else point
            for r, point in _points(table, place).items()
            if group_name(table, r) == group
        ]
        if points:
            charts.append(forest_chart(column.header, column.direction, points, text, header, zero=zero))
    return charts


def _rows_of(tables: Tables, headers: Mapping[str, str]) -> list[Chart]:
    charts = []
    for name, header in headers.items():
        for table in _present(tables, name):
            charts += _forests(table, header, f"{table.title}. {ROWS}")
    return charts


def _curve(tables: Tables, name: str, metric: str, label: str, actor: str) -> list[Curve]:
    """Return the curve of a table's metric over its first column, in a list; an empty list without values."""
    if name not in tables or not _has(tables[name], metric):
        return []
    table = tables[name]
    points = [
        Point(label, float(x), point.estimate)
        for r, point in _points(table, _place(table, metric)).items()
        if isinstance(x := table.rows[r][0], int | float)
    ]
    colour, shape = LOOKS[actor]
    return [Curve(label, colour, sorted(points, key=lambda point: float(point.x)), shape)] if points else []


def _levels(tables: Tables, metric: str) -> list[Curve]:
    """Return the pure runs as levels."""
    if "pure" not in tables or not _has(tables["pure"], metric):
        return []
    points = _points(tables["pure"], _place(tables["pure"], metric)).values()
    return [Curve(f"{p.name} alone", LOOKS[p.name][0] if p.name in LOOKS else MUTED, [p], level=True) for p in points]
