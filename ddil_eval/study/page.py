"""The page of a study: under which conditions a source of states helps, on which measure, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ddil_core.support.text import listed
from ddil_eval.report.comparisons import LEVEL
from ddil_eval.study.analysis import Effect, Place, axes_of, cost_of, is_drawn, rank_correlations
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.matrix import Cell, Unit
from ddil_eval.study.records import UnitRecord
from ddil_eval.study.words import change_words, sentence, short_title, states_words, title

EXPLAINING = ("disagreement_student", "disagreement_data", "disagreement_teacher", "shift_ratio")
"""Measures that say why: the losses on states of each kind, and their ratio."""


def render_page(config: StudyConfig, units: int, done: Mapping[Unit, UnitRecord], effects: Sequence[Effect]) -> str:
    """Return the page as Markdown.

    Args:
        config: The study.
        units: The number of its units.
        done: The records of the units that are done.
        effects: All effects.
    """
    tested = [name for name in config.measure.tested if any(e.measure == name for e in effects)]
    lines = [heading(config.title), "", *_setting(config, units, done), ""]
    lines += [*_how_to_read(config), "", "## In short", ""]
    lines += [line for name in tested for line in _summary(config, name, [e for e in effects if e.measure == name])]
    for name in tested:
        lines += ["", f"## {short_title(name).capitalize()}", "", f"The measure is the {title(name)}.", ""]
        lines += _places(config, [e for e in effects if e.measure == name], effects)
    lines += ["", "## What goes with what", "", *_correlations(config, effects)]
    lines += ["", "## Files", "", *_files(config, tested, effects)]
    return "\n".join(lines) + "\n"


def heading(study: str) -> str:
    """Return the first line of the page of a study, which has its title."""
    return f"# {' '.join(study.split())}"


def _setting(config: StudyConfig, units: int, done: Mapping[Unit, UnitRecord]) -> Iterator[str]:
    seeds = len(config.seed_list())
    yield f"{len(done):,} of {units:,} units are done: distillations of `{config.teacher}` with {seeds} seeds each."
    equal = "updates" if config.budget == "updates" else "evaluations of the teacher"
    yield f"All sources of states have equal {equal}."
    costs = cost_of(done)
    ratios: dict[str, list[float]] = {}
    for cell, cost in costs.items():
        base = costs.get(Cell(cell.condition, config.baseline))
        if base and cell.source != config.baseline:
            ratios.setdefault(cell.source, []).append(cost / base)
    if ratios:
        parts = [f"{source} {_span(found)}" for source, found in ratios.items()]
        yield f"Evaluations of the teacher, over those with {config.baseline} states: {listed(parts, 'and')}."


def _span(numbers: Sequence[float]) -> str:
    low, high = (f"{number:.3f}" for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def _how_to_read(config: StudyConfig) -> Iterator[str]:
    yield (
        f"Every number compares a source of states with `{config.baseline}`, paired by seed. Relative changes are "
        "means of differences of logarithms. Intervals are 95 % intervals by Student's t over the seeds. p-values are "
        "those of the exact sign-flip test, corrected for all tests of the study by Holm's method. The difficulty of a "
        f"condition is the end distance of its student of {config.baseline} states: how far the student ends from its "
        "teacher, from the same noise. Measures that are not tested have intervals alone."
    )


def _summary(config: StudyConfig, measure: str, effects: Sequence[Effect]) -> Iterator[str]:
    found = [effect for effect in effects if effect.significant(LEVEL)]
    helps = [effect for effect in found if effect.better]
    harms = [effect for effect in found if not effect.better]
    yield (
        f"- **{short_title(measure)}**: of {len(effects)} tests, {len(helps)} find that rollout states help, "
        f"{len(harms)} that they harm, and {len(effects) - len(found)} decide nothing at the {100 * LEVEL:g} % level."
    )
    for word, part in (("most help", helps), ("most harm", harms)):
        if part:
            best = max(part, key=lambda effect: abs(effect.estimate.value))
            yield f"  The {word}, with {best.place.words(len(config.methods) > 1)}: {sentence(best)}."


def _places(config: StudyConfig, effects: Sequence[Effect], every: Sequence[Effect]) -> Iterator[str]:
    """Yield a paragraph for each place, the easiest first."""
    by_place: dict[Place, list[Effect]] = {}
    for effect in effects:
        by_place.setdefault(effect.place, []).append(effect)
    for place, here in sorted(by_place.items(), key=lambda item: item[1][0].difficulty or 0.0):
        hard = "" if here[0].difficulty is None else f" (difficulty {here[0].difficulty:.3g})"
        yield f"- **{place.words(len(config.methods) > 1)}**{hard}. {_verdict(here)} {_why(here, every)}".rstrip()


def _verdict(effects: Sequence[Effect]) -> str:
    """Return what the tests of one place say."""
    found = [effect for effect in effects if effect.significant(LEVEL)]
    strongest = max(effects, key=lambda effect: abs(effect.estimate.value))
    if not found:
        many = f"None of {len(effects)} tests decides" if len(effects) > 1 else "The test decides nothing"
        return f"{many}; the largest change: {sentence(strongest)}."
    sentences = []
    for word, part in (
        ("help", [effect for effect in found if effect.better]),
        ("harm", [effect for effect in found if not effect.better]),
    ):
        if part:
            best = max(part, key=lambda effect: abs(effect.estimate.value))
            sentences.append(f"{sentence(best)}. Rollout states {word} in {len(part)} of {len(effects)} tests.")
    return " ".join(sentences)


def _why(effects: Sequence[Effect], every: Sequence[Effect]) -> str:
    """Return what the strongest change of a place goes with."""
    strongest = max(effects, key=lambda effect: abs(effect.estimate.value))
    same = {
        effect.measure: effect
        for effect in every
        if (effect.place, effect.source, effect.share) == (strongest.place, strongest.source, strongest.share)
    }
    parts = [
        f"{short_title(name)} {'falls' if same[name].estimate.value < 0 else 'rises'} by {change_words(same[name])}"
        for name in EXPLAINING
        if name in same and same[name].relative
    ]
    states = states_words(strongest.source, strongest.share)
    return f"With {states}, {listed(parts, 'and')}." if parts else ""


def _correlations(config: StudyConfig, effects: Sequence[Effect]) -> Iterator[str]:
    found = rank_correlations(config, effects)
    if not found:
        yield "There are too few conditions for a rank correlation."
        return
    yield (
        "Spearman's rank correlation between the effect on a tested measure and that on another, over all conditions, "
        "sources and shares. Cells of one condition share their baseline, so these numbers describe and do not test."
    )
    yield ""
    yield "| effect on | goes with the effect on | rank correlation | cells |"
    yield "|---|---|---:|---:|"
    for (tested, other), (value, cells) in sorted(found.items(), key=lambda item: (item[0][0], -abs(item[1][0]))):
        yield f"| {short_title(tested)} | {short_title(other)} | {value:+.2f} | {cells} |"


def _files(config: StudyConfig, tested: Sequence[str], effects: Sequence[Effect]) -> Iterator[str]:
    if is_drawn(config, effects):
        yield "- `effects.png`: each effect over the difficulty of its condition"
    for axis in axes_of(config, effects):
        yield f"- `effects-by-{axis}.png`: each effect over the {axis}"
    yield "- `effects.csv`: every effect with its interval and p-values"
    yield "- `values.csv`: every measure of every student"
    yield f"- `table-{tested[0] if tested else 'MEASURE'}.csv` and `.tex`, and so on: the effects on each measure"
