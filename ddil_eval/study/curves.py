"""Figures of a study over one of its numbers: what each source changes, over the share or a factor's values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ddil_core.support.image_grids import save_figure
from ddil_eval.report.comparisons import LEVEL
from ddil_eval.study.analysis import SHARE, Effect, Place
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.figure import COLOURS, MARKERS, add_legend, change_label, drawn_change
from ddil_eval.study.matrix import Condition
from ddil_eval.study.words import short_title, states_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_IN_A_ROW = 4
"""The most panels of one measure in a row."""
_APART = 0.012
"""How far apart curves stand, as a part of the axis, so that their intervals do not hide one another."""


def draw_curves(config: StudyConfig, effects: Sequence[Effect], axis: str, path: Path) -> Path:
    """Draw the effects on each tested measure over one axis, and return the file.

    Each measure has a panel for every place without its value on the axis, in one row or several. A curve is a source,
    with its share where the axis is a factor. Filled marks are significant after Holm's correction.

    Args:
        config: The study.
        effects: All effects.
        axis: ``SHARE``, or the name of a factor (``axes_of``).
        path: The file.
    """
    measures = [name for name in config.measure.tested if any(e.measure == name for e in effects)]
    tested = [effect for effect in effects if effect.measure in measures]
    places = list(dict.fromkeys(_rest(effect.place, axis) for effect in tested))
    lines = math.ceil(len(places) / _MOST_IN_A_ROW)
    columns = math.ceil(len(places) / lines)
    shares = axis != SHARE and len(config.shares) > 1
    keys = list(dict.fromkeys(_curve_of(effect, shares) for effect in tested))
    figure = Figure(figsize=(3.2 * columns + 2.2, 2.9 * len(measures) * lines + 0.6), layout="constrained")
    rows = figure.subplots(len(measures) * lines, columns, squeeze=False, sharex=True).reshape(len(measures), -1)
    for panels, measure in zip(rows, measures, strict=True):
        change = change_label([effect for effect in tested if effect.measure == measure])
        for number, ax in enumerate(panels):
            if number >= len(places):
                ax.set_axis_off()
                continue
            if number:
                ax.sharey(panels[0])
            here = [e for e in tested if e.measure == measure and _rest(e.place, axis) == places[number]]
            _panel(ax, [[e for e in here if _curve_of(e, shares) == key] for key in keys], axis)
            title = f"{short_title(measure)}\n{places[number].words(len(config.methods) > 1)}"
            ax.set_title(title, fontsize=9, parse_math=False)
            if number % columns == 0:
                ax.set_ylabel(change, fontsize=9)
            else:
                ax.tick_params(labelleft=False)
    for ax in rows[-1][max(0, len(places) - columns) : len(places)]:
        label = "share of aggregated states" if axis == SHARE else axis.rpartition(".")[2]
        ax.set_xlabel(label, parse_math=False)
        ax.tick_params(labelbottom=True)
    handles = [
        Line2D([], [], label=states_words(*key), color=colour, marker=marker, markersize=5)
        for key, (colour, marker) in ((key, _look(number)) for number, key in enumerate(keys))
    ]
    add_legend(figure, handles)
    return save_figure(figure, path, 150)


def _panel(ax: Axes, curves: Sequence[Sequence[Effect]], axis: str) -> None:
    """Draw the effects of each curve. The order of the curves gives their looks."""
    ax.axhline(0.0, color="#999999", linewidth=0.8)
    places = sorted({_value(effect, axis) for effects in curves for effect in effects})
    width = places[-1] - places[0] if places else 0
    for number, effects in enumerate(curves):
        colour, marker = _look(number)
        shift = (number - (len(curves) - 1) / 2) * _APART * width
        drawn = sorted((_value(effect, axis) + shift, *drawn_change(effect)) for effect in effects)
        ax.plot([x for x, *_ in drawn], [value for _, value, *_ in drawn], color=colour, linewidth=1.4)
        ax.vlines(
            [x for x, *_ in drawn], [low for *_, low, _ in drawn], [high for *_, high in drawn], colour, linewidth=0.9
        )
        for effect in effects:
            face = colour if effect.significant(LEVEL) else "white"
            x, value = _value(effect, axis) + shift, drawn_change(effect)[0]
            ax.plot(x, value, marker, color=colour, markersize=5, markerfacecolor=face, markeredgewidth=0.9)
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _value(effect: Effect, axis: str) -> float:
    """Return the place of an effect on the axis."""
    if axis == SHARE:
        return effect.share or 0.0
    return float(dict(effect.place.condition.factors)[axis])


def _rest(place: Place, axis: str) -> Place:
    """Return a place without its value on the axis."""
    condition = place.condition
    factors = tuple((name, value) for name, value in condition.factors if name != axis)
    return Place(Condition(condition.method, factors), place.steps)


def _curve_of(effect: Effect, shares: bool) -> tuple[str, float | None]:
    """Return the source of an effect, and its share where shares are told apart."""
    return effect.source, effect.share if shares else None


def _look(number: int) -> tuple[str, str]:
    """Return the colour and the marker of a curve."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
