"""The figure of a study: the effect of each source of states against the difficulty of the condition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ddil_core.support.image_grids import save_figure
from ddil_eval.report.comparisons import LEVEL
from ddil_eval.study.analysis import Effect
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.words import short_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, for any colour vision."""
MARKERS = "osD^vP"


def draw_effects(config: StudyConfig, effects: Sequence[Effect], path: Path) -> Path:
    """Draw the effects on each tested measure over the difficulty, and return the file.

    A colour is a source, a larger mark a larger share, and a shape a number of steps. Filled marks are significant
    after Holm's correction.

    Args:
        config: The study.
        effects: All effects.
        path: The file.
    """
    names = [name for name in config.measure.tested if any(e.measure == name for e in effects)]
    figure = Figure(figsize=(5.4 * len(names) + 1.6, 4.4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        _panel(ax, config, [effect for effect in effects if effect.measure == name and effect.difficulty is not None])
        ax.set_title(short_title(name), fontsize=11, parse_math=False)
    add_legend(figure, _legend(config, effects))
    return save_figure(figure, path, 150)


def _panel(ax: Axes, config: StudyConfig, effects: Sequence[Effect]) -> None:
    sources = [name for name in config.sources if name != config.baseline]
    steps = sorted({effect.place.steps for effect in effects}, reverse=True)
    cells = [(source, share) for source in sources for share in sorted({e.share or 0 for e in effects})]
    for effect in effects:
        assert effect.difficulty is not None
        value, low, high = drawn_change(effect)
        offset = (cells.index((effect.source, effect.share or 0)) - (len(cells) - 1) / 2) * 0.006
        x, colour = effect.difficulty * np.exp(offset), COLOURS[sources.index(effect.source) % len(COLOURS)]
        ax.plot([x, x], [low, high], color=colour, linewidth=0.7, alpha=0.6)
        ax.plot(
            x, value, MARKERS[steps.index(effect.place.steps) % len(MARKERS)], color=colour,
            markersize=_size(effect.share), markerfacecolor=colour if effect.significant(LEVEL) else "white",
            markeredgewidth=0.8,
        )  # fmt: skip
    ax.axhline(0.0, color="#999999", linewidth=0.8)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    low, high = ax.get_xlim()
    labelled = "23456789" if high < 5 * low else "235"  # first digits of the ticks between powers of ten
    ax.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in labelled else "")
    ax.tick_params(which="both", labelsize=8)
    ax.set_xlabel(f"difficulty: end distance of the student of {config.baseline} states", parse_math=False)
    ax.set_ylabel(change_label(effects))
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Add a legend on the right, which also says what a hollow mark is. Names are no formulas."""
    hollow = Line2D([], [], linestyle="", color="#666666", marker="o", markerfacecolor="white", label="not significant")
    legend = figure.legend(handles=[*handles, hollow], loc="outside right center", frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def drawn_change(effect: Effect) -> tuple[float, float, float]:
    """Return the change of an effect with the ends of its interval, a relative one in per cent."""
    value, low, high = (100 * number if effect.relative else number for number in effect.change)
    return value, low, high


def change_label(effects: Sequence[Effect]) -> str:
    """Return the title of the axis of the changes of one measure."""
    better = "below 0 is better" if effects and effects[0].direction == "lower" else "above 0 is better"
    return f"change{', %' if effects and effects[0].relative else ''} ({better})"


def _size(share: float | None) -> float:
    return 6.0 if share is None else 3.0 + 4.0 * share


def _legend(config: StudyConfig, effects: Sequence[Effect]) -> list[Line2D]:
    """Return the entries of the legend."""
    sources = [name for name in config.sources if name != config.baseline]
    steps = sorted({effect.place.steps for effect in effects}, reverse=True)
    shares = sorted({effect.share for effect in effects if effect.share is not None})
    rows: list[tuple[str, dict[str, Any]]]
    rows = [(f"{s} states", {"color": COLOURS[i % len(COLOURS)], "marker": "o"}) for i, s in enumerate(sources)]
    if len(shares) > 1:
        rows += [(f"share {s:g}", {"color": "#666666", "marker": "o", "markersize": _size(s)}) for s in shares]
    rows += [
        (f"{n} {'step' if n == 1 else 'steps'}", {"color": "#666666", "marker": MARKERS[i % len(MARKERS)]})
        for i, n in enumerate(steps)
    ]
    return [Line2D([], [], linestyle="", label=text, **style) for text, style in rows]
