"""Charts as Vega-Lite specifications, with the same numbers as a table for those who do not see the chart.

Colours are CSS variables, so that one chart is drawn for a light page, a dark page and print. Texts from records are
values of the data and never field names or expressions, so that they are drawn as they are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ddil_eval.report.records import Direction, RecordedEstimate
from ddil_eval.report.rendering import decimals_of, print_cell

Shape = Literal["circle", "square", "diamond", "triangle-up", "triangle-down"]
Spec = dict[str, Any]

TEACHER, STUDENT, MIXED = "var(--teacher)", "var(--student)", "var(--mixed)"
LOOKS: dict[str, tuple[str, Shape]] = {
    "mixed": (MIXED, "square"),
    "teacher": (TEACHER, "circle"),
    "student": (STUDENT, "diamond"),
    "fourth": ("var(--fourth)", "triangle-up"),
    "fifth": ("var(--fifth)", "triangle-down"),
}
"""The colour and the mark of each look of a curve: of an actor, or of one curve among others."""
ACCENT, MUTED = "var(--accent)", "var(--muted)"
_ARROWS = {"lower": "↓ lower is better", "higher": "↑ higher is better", None: ""}
_LINE = 24
"""The most characters of a line of a row's name. A longer name breaks between words, and "A − B" after the sign."""
_LINE_HEIGHT = 14
"""The height of a line of a row's name, in pixels."""
_HALO: tuple[Spec, Spec] = ({"stroke": "var(--paper)", "strokeWidth": 4}, {"color": "currentColor"})
"""Text is drawn twice: first its outline in the colour of the page, so that no line runs through it."""
_APART = 6
"""The least distance of two labels of an axis, in pixels; labels that are nearer are left out."""
_FONT = "system-ui, sans-serif"
_CONFIG: Spec = {
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor", "titleColor": "currentColor", "gridColor": "var(--grid)",
        "domainColor": "var(--line)", "tickColor": "var(--line)", "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "labelLimit": 176,
    },
    "axisX": {"grid": False},
    "text": {"fontSize": 12, "font": _FONT},
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One value of a chart.

    Attributes:
        name: The system, the curve or the row that it belongs to.
        x: Its place: a number, or the name of a place.
        estimate: The value with its interval.
        marked: Whether it is on the front, the best, or significant.
    """

    name: str
    x: float | str
    estimate: RecordedEstimate
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: The title.
        text: What the chart shows, in sentences. The page says it once for charts that share it.
        spec: The Vega-Lite specification.
        header: The header of the table with the same numbers.
        rows: The rows of that table.
        legend: For each curve: its label, the name of its colour, and its look.
        numbered: The names of the points that have a number in the chart, from 1.
        note: What this chart alone shows, in a sentence.
    """

    title: str
    text: str
    spec: Spec
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[tuple[str, str, str], ...] = ()
    numbered: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A curve of a chart: its label, its CSS colour, its points, and whether it is a level that holds everywhere."""

    label: str
    colour: str
    points: Sequence[Point]
    shape: Shape = "circle"
    level: bool = False


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: its title, its places in order, and whether numbers are spaced by their values."""

    title: str
    places: Sequence[float | str] = field(default_factory=tuple)
    numeric: bool = False
    falling: bool = False


def heading(metric: str, direction: Direction | None) -> str:
    """Return the title of a metric's chart, with the direction that is better."""
    return " ".join(part for part in (metric, _ARROWS[direction]) if part)


def cost_chart(metric: str, direction: Direction | None, points: Sequence[Point], text: str) -> Chart:
    """Draw quality against cost. Points of one cost stand side by side; marked points form the front.

    Points of the front have numbers, by rising cost. Names would overlap one another and the edge of a narrow chart.
    """
    costs = sorted({float(point.x) for point in points})
    most = max(sum(float(point.x) == cost for point in points) for cost in costs)
    taken = {cost: (most - sum(float(point.x) == cost for point in points)) // 2 for cost in costs}
    leading = sorted((point for point in points if point.marked), key=lambda point: float(point.x))
    numbers = {id(point): f"{number}" for number, point in enumerate(leading, start=1)}
    values = []
    for point, shown in _shown(points):
        cost = float(point.x)
        placed = {"x": f"{cost:g}", "cost": cost, "slot": taken[cost], "number": numbers.get(id(point), "")}
        values.append(_value(point, shown) | placed)
        taken[cost] += 1
    x: Spec = {
        "x": {"field": "x", "type": "ordinal", "sort": [f"{cost:g}" for cost in costs], "title": "NFE",
              "axis": {"labelAngle": 0}, "scale": {"paddingInner": 0.15, "paddingOuter": 0.1}},
        "xOffset": {"field": "slot", "type": "ordinal", "scale": {"domain": list(range(most))}},
    }  # fmt: skip
    colour = {"color": {"condition": {"test": "datum.marked", "value": ACCENT}, "value": MUTED}}
    front = [{"filter": "datum.marked"}]
    # what the front beats lies on its other side, so that a number there hides nothing
    end, shift, baseline = ("high", -6, "bottom") if direction == "higher" else ("low", 6, "top")
    label: Spec = {"y": _quantity(end), "text": {"field": "number"}}
    numbered: Spec = {"type": "text", "dy": shift, "baseline": baseline, "fontWeight": 600, "aria": False}
    room = {"zero": False, "padding": 24}
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "strokeDash": [4, 3], "strokeWidth": 1.5, "color": ACCENT, "aria": False},
            "transform": front,
            "encoding": x | {"y": _quantity("value") | {"scale": room}, "order": _quantity("cost")},
        },
        {"mark": {"type": "rule", "strokeWidth": 2, "aria": False}, "encoding": x | colour | _interval("y")},
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "encoding": x | colour | {"y": _quantity("value")} | _hover(("name", "System"), ("x", "NFE")),
        },
        *({"mark": numbered | look, "transform": front, "encoding": x | label} for look in _HALO),
    ]
    rows = [(p.name, f"{float(p.x):g}", s, numbers.get(id(p), "")) for p, s in _shown(points)]
    header = ("System", "NFE", metric, "Number on the front")
    chart = _chart(metric, direction, text, values, layers, 240, header, rows)
    return replace(chart, numbered=tuple(point.name for point in leading))


def forest_chart(
    metric: str, direction: Direction | None, points: Sequence[Point], text: str, header: str, *, zero: bool = False
) -> Chart:
    """Draw values with their intervals below one another, one row for each name. Marked points are filled.

    Args:
        metric: The metric.
        direction: Which values are better.
        points: The values.
        text: What the chart shows.
        header: What the rows are, such as "System".
        zero: Draw a line at 0, for differences.
    """
    lines = {point.name: name_lines(point.name) for point in points}
    most = max(map(len, lines.values()), default=1)
    # Vega puts the first line beside the row, so that a name of more lines has to move up
    higher = [
        {"test": f"length(split(datum.label, '\\n')) == {count}", "value": -_LINE_HEIGHT * (count - 1) / 2}
        for count in range(2, most + 1)
    ]
    names = {
        "ticks": False, "domain": False, "labelPadding": 8, "grid": True, "labelExpr": "split(datum.label, '\\n')",
        "labelLineHeight": _LINE_HEIGHT, "labelOffset": {"condition": higher, "value": 0},
    }  # fmt: skip
    y = {"y": {"field": "row", "type": "nominal", "sort": None, "title": None, "axis": names}}
    x = {"x": _quantity("value") | {"axis": {"tickCount": 4, "labelOverlap": "parity", "labelSeparation": _APART}}}
    layers: list[Spec] = [
        *([_line("x", 0)] if zero else []),
        {"mark": {"type": "rule", "strokeWidth": 2, "color": ACCENT, "aria": False}, "encoding": y | _interval("x")},
        {
            "mark": {"type": "point", "size": 70, "opacity": 1, "stroke": ACCENT, "strokeWidth": 2},
            "encoding": y
            | x
            | {"fill": {"condition": {"test": "datum.marked", "value": ACCENT}, "value": "var(--paper)"}}
            | _hover(("name", header)),
        },
    ]
    values = [_value(point, shown) | {"row": "\n".join(lines[point.name])} for point, shown in _shown(points)]
    mark = "Significant" if zero else "Best"
    rows = [(point.name, shown, "yes" if point.marked else "") for point, shown in _shown(points)]
    height = (12 + _LINE_HEIGHT * most) * len(points)
    return _chart(metric, direction, text, values, layers, height, (header, metric, mark), rows)


def name_lines(name: str) -> list[str]:
    """Return the lines of a row's name, which show all of it. A long "A − B" breaks after the sign."""
    if len(name) <= _LINE:
        return [name]
    first, sign, second = name.partition(" − ")
    parts = [f"{first} −", second] if sign else [name]
    return [line for part in parts for line in textwrap.wrap(part, _LINE, break_on_hyphens=False)]


def curve_chart(
    metric: str, direction: Direction | None, curves: Sequence[Curve], axis: Axis, text: str, note: str = "", *,
    line: float | None = None,
) -> Chart:  # fmt: skip
    """Draw curves with bands of their intervals. A level is a horizontal line with a band.

    Args:
        metric: The metric.
        direction: Which values are better.
        curves: The curves.
        axis: The horizontal axis.
        text: What charts of this kind show.
        note: What this chart alone shows.
        line: A value at which a line is drawn.
    """
    places = list(axis.places)
    everything = [point for curve in curves for point in curve.points]
    shown = dict(zip(map(id, everything), (text for _, text in _shown(everything)), strict=True))
    values, rows = list[Spec](), list[tuple[str, ...]]()
    for curve in curves:
        for point in curve.points:
            at = places if curve.level else [point.x]
            values += [
                _value(point, shown[id(point)])
                | {"name": curve.label, "x": x, "level": curve.level, "shape": curve.shape}
                for x in at
            ]
            rows.append((curve.label, "everywhere" if curve.level else f"{point.x}", shown[id(point)]))
    layers = _curve_layers(curves, axis)
    if line is not None:
        layers.insert(0, _line("y", line))
    legend = tuple(
        (c.label, c.colour.removeprefix("var(--").rstrip(")"), "level" if c.level else c.shape) for c in curves
    )
    chart = _chart(metric, direction, text, values, layers, 230, ("Curve", axis.title, metric), rows)
    return replace(chart, legend=legend, note=note)


def _curve_layers(curves: Sequence[Curve], axis: Axis) -> list[Spec]:
    """Return the bands, lines and points of curves."""
    colour = {
        "field": "name", "type": "nominal", "sort": None,
        "scale": {"domain": [c.label for c in curves], "range": [c.colour for c in curves]},
        "legend": None,  # the page has one in HTML, which wraps on a narrow screen
    }  # fmt: skip
    place: Spec = {"field": "x", "type": "quantitative" if axis.numeric else "ordinal", "title": axis.title}
    places = list(axis.places)
    if axis.numeric:
        place |= {"axis": {"values": places}, "scale": {"zero": False, "nice": False, "reverse": axis.falling,
                                                        "padding": 12}}  # fmt: skip
    else:
        shown = {"labelAngle": 0, "labelOverlap": "greedy", "labelSeparation": _APART}
        place |= {"sort": places, "axis": shown, "scale": {"type": "point", "padding": 0.25}}
    base = {"x": place, "color": colour}
    return [
        *(
            {
                "mark": {"type": "area", "opacity": opacity, "aria": False},
                "transform": [{"filter": test}],
                "encoding": base | _interval("y"),
            }
            for test, opacity in (("datum.level", 0.09), ("!datum.level", 0.2))
            if test.startswith("!") or any(curve.level for curve in curves)
        ),
        {
            "mark": {"type": "line", "strokeWidth": 2, "aria": False},
            "encoding": base
            | {"y": _quantity("value"),
               "strokeDash": {"condition": {"test": "datum.level", "value": [5, 4]}, "value": [1, 0]},
               "detail": {"field": "level"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "transform": [{"filter": "!datum.level"}],
            "encoding": base
            | {"y": _quantity("value"), "shape": {"field": "shape", "type": "nominal", "scale": None}}
            | _hover(("name", "Curve"), ("x", axis.title)),
        },
    ]  # fmt: skip


def _line(axis: Literal["x", "y"], value: float) -> Spec:
    """Return a line across the chart at a value of an axis."""
    rule = {"type": "rule", "color": "var(--line)", "strokeWidth": 1.5, "aria": False}
    return {"mark": rule, "encoding": {axis: {"datum": value, "type": "quantitative"}}}


def _chart(
    metric: str, direction: Direction | None, text: str, values: Sequence[Spec], layers: Sequence[Spec], height: int,
    header: tuple[str, ...], rows: Sequence[tuple[str, ...]],
) -> Chart:  # fmt: skip
    title = heading(metric, direction)
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": f"{title}. {text}",
        "width": "container",
        "height": max(height, 60),
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": _CONFIG,
        "data": {"values": list(values)},
        "layer": list(layers),
    }
    return Chart(title, text, spec, header, tuple(rows))


def _shown(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """Return each point with its value and interval in print, all with the same decimals."""
    digits = decimals_of([point.estimate for point in points])
    return [(point, " ".join(print_cell(point.estimate, digits))) for point in points]


def _value(point: Point, shown: str) -> Spec:
    estimate = point.estimate
    return {
        "name": point.name, "x": point.x, "value": estimate.value, "low": estimate.low, "high": estimate.high,
        "marked": point.marked, "shown": shown,
    }  # fmt: skip


def _quantity(name: str) -> Spec:
    return {"field": name, "type": "quantitative", "scale": {"zero": False}, "title": None}


def _interval(axis: Literal["x", "y"]) -> Spec:
    return {axis: _quantity("low"), f"{axis}2": {"field": "high"}}


def _hover(*fields: tuple[str, str]) -> Spec:
    return {"tooltip": [{"field": name, "title": title} for name, title in (*fields, ("shown", "Value"))]}
