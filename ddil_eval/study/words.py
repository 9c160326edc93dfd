"""Effects in plain sentences."""

from __future__ import annotations

from typing import NamedTuple

from ddil_eval.report.rendering import print_p
from ddil_eval.study.analysis import Effect


class Wording(NamedTuple):
    """How sentences speak of a measure.

    Attributes:
        title: What the measure is called.
        subject: What moves, after "bring".
        nearer: What it does when the measure falls.
        further: What it does when the measure rises.
    """

    title: str
    subject: str
    nearer: str
    further: str


_TRUE = "the points", "nearer to the true distribution", "further from the true distribution"
WORDINGS = {
    "end_distance": Wording(
        "distance of the end of the trajectory to the teacher's",
        *("the end of the trajectory", "nearer to the teacher's", "further from the teacher's"),
    ),
    "energy_distance": Wording("energy distance to the true distribution", *_TRUE),
    "sliced_wasserstein": Wording("sliced Wasserstein distance to the true distribution", *_TRUE),
}
"""Measures that sentences call by more than their name."""


def short_title(measure: str) -> str:
    """Return the name of a measure for a figure or a heading."""
    return measure.replace("_", " ")


def title(measure: str) -> str:
    """Return what a measure is called."""
    return WORDINGS[measure].title if measure in WORDINGS else f"`{measure}`"


def states_words(source: str, share: float | None) -> str:
    """Return a source of states in words, with its share where it has one."""
    return f"{source} states" + ("" if share is None else f" (share {share:g})")


def source_words(effect: Effect) -> str:
    """Return the source of an effect as the subject of a sentence."""
    words = states_words(effect.source, effect.share)
    return words[:1].upper() + words[1:]


def change_words(effect: Effect) -> str:
    """Return the size of a change with its interval: a relative one without its sign, which the sentence says."""
    value, low, high = effect.change
    if not effect.relative:
        return f"{value:+.3g} [{low:+.3g}, {high:+.3g}]"
    numbers = sorted((100 * low, 100 * high))
    if value < 0:
        numbers = sorted(-number for number in numbers)
    digits = 0 if abs(100 * value) >= 10 else 1
    return f"{abs(100 * value):.{digits}f} % [{numbers[0]:.{digits}f}, {numbers[1]:.{digits}f}]"


def sentence(effect: Effect) -> str:
    """Return an effect as a sentence, with its corrected p-value where it is tested."""
    p = "" if effect.p_holm is None else f"{print_p(effect.p_holm, '.2g')}, "
    tested = f"({p}{effect.estimate.n} seeds)"
    worded = WORDINGS.get(effect.measure)
    if worded is not None and effect.relative:
        way = worded.nearer if effect.estimate.value < 0 else worded.further
        return f"{source_words(effect)} bring {worded.subject} {change_words(effect)} {way} {tested}"
    if effect.relative:
        way = "lower" if effect.estimate.value < 0 else "raise"
        return f"{source_words(effect)} {way} {title(effect.measure)} by {change_words(effect)} {tested}"
    return f"{source_words(effect)} change {title(effect.measure)} by {change_words(effect)} {tested}"
