"""The tables of a study: the effects on each measure, and the values of every unit."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from ddil_eval.report.comparisons import LEVEL
from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.table_type import Cell, Column, Table
from ddil_eval.study.analysis import Effect, Place
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.matrix import Condition, Unit
from ddil_eval.study.records import UnitRecord


def effect_tables(config: StudyConfig, effects: Sequence[Effect]) -> list[Table]:
    """Return a table of effects for each measure, the tested measures first."""
    tested = [name for name in config.measure.tested if any(e.measure == name for e in effects)]
    others = [name for name in dict.fromkeys(e.measure for e in effects) if name not in tested]
    return [_effect_table(config, name, [e for e in effects if e.measure == name]) for name in [*tested, *others]]


def _effect_table(config: StudyConfig, measure: str, effects: Sequence[Effect]) -> Table:
    steps = sorted({effect.place.steps for effect in effects}, reverse=True)
    factors = list(config.factors)
    one = effects[0]
    unit = f"Change of {measure} against {config.baseline}, {'in percent' if one.relative else 'as a difference'}"
    columns = [Column(key, key.rpartition(".")[2]) for key in ("method", *factors, "source", "share")]
    columns += [
        Column(
            f"steps_{n}",
            f"{n} steps",
            "measured",
            one.direction,
            interval=True,
            tested=one.estimate.p_value is not None,
        )
        for n in steps
    ]
    rows: dict[tuple[Condition, str, float | None], dict[int, Effect]] = {}
    for effect in effects:
        rows.setdefault((effect.place.condition, effect.source, effect.share), {})[effect.place.steps] = effect
    cells, corrected = list[tuple[Cell, ...]](), dict[tuple[int, int], float]()
    first = len(factors) + 3
    for r, ((condition, source, share), by_steps) in enumerate(rows.items()):
        head: list[Cell] = [condition.method, *(value for _, value in condition.factors), source, share]
        cells.append((*head, *(shown(by_steps[n]) if n in by_steps else None for n in steps)))
        for c, n in enumerate(steps, first):
            if n in by_steps and (p := by_steps[n].p_holm) is not None:
                corrected[r, c] = p
    tests = sum(effect.p_holm is not None for effect in effects)
    starred = f" A star marks p < {LEVEL:g} after Holm's correction for all tests of the study." if tests else ""
    seeds = sorted({effect.estimate.n for effect in effects})
    caption = (
        f"{unit}; 95 % intervals are Student's over {'-'.join(map(str, seeds[:1] + seeds[1:][-1:]))} seeds, and "
        f"printed p-values those of the uncorrected sign-flip test.{starred}"
    )
    significant = frozenset(place for place, p in corrected.items() if p < LEVEL)
    return Table(
        "study", measure, f"{config.title}: {measure}", caption, tuple(columns), tuple(cells),
        significant=significant, corrected=corrected,
    )  # fmt: skip


def shown(effect: Effect) -> RecordedEstimate:
    """Return an effect as tables print it: a change in percent where it is relative."""
    value, low, high = (number * (100 if effect.relative else 1) for number in effect.change)
    return RecordedEstimate(value=value, low=low, high=high, n=effect.estimate.n, p_value=effect.estimate.p_value)


def effects_csv(config: StudyConfig, effects: Sequence[Effect]) -> str:
    """Return all effects as CSV at full precision, one row each."""
    head = [
        *_head(config), "source", "share", "measure", "seeds", "difficulty", "baseline", "relative", "change", "low",
        "high", "p", "p_holm",
    ]  # fmt: skip
    return _csv(head, (_effect_row(effect) for effect in effects))


def _effect_row(effect: Effect) -> list[object]:
    found = effect.estimate
    return [
        *_place(effect.place), effect.source, effect.share, effect.measure, found.n, effect.difficulty, effect.baseline,
        effect.relative, *effect.change, found.p_value, effect.p_holm,
    ]  # fmt: skip


def values_csv(config: StudyConfig, done: Mapping[Unit, UnitRecord]) -> str:
    """Return the measures of every student as CSV, one row for each student."""
    names = list(dict.fromkeys(name for r in done.values() for student in r.students.values() for name in student))

    def rows() -> Iterator[list[object]]:
        for unit, record in done.items():
            for steps, student in record.students.items():
                head = [*_place(Place(unit.cell.condition, steps)), unit.cell.source, unit.cell.share, unit.seed]
                yield [*head, record.teacher_nfe, *(student.get(name) for name in names)]

    return _csv([*_head(config), "source", "share", "seed", "teacher_nfe", *names], rows())


def _head(config: StudyConfig) -> list[str]:
    return ["method", *config.factors, "steps"]


def _place(place: Place) -> list[object]:
    return [place.condition.method, *(value for _, value in place.condition.factors), place.steps]


def _csv(head: Sequence[str], rows: Iterator[list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()
