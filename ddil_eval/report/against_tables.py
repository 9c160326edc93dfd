"""A comparison of two results folders → one table for each experiment and metric, and one sentence on the worst."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ddil_eval.report.against import Against, Comparison, cell_words
from ddil_eval.report.comparisons import LEVEL
from ddil_eval.report.records import Record
from ddil_eval.report.rendering import print_p
from ddil_eval.report.setting_changes import setting_changes
from ddil_eval.report.table_type import Cell, Column, Table

GROUP = "against"
"""The name of the folder of these tables."""
PAIRED, INDEPENDENT = "paired by prompt", "independent"


def against_tables(against: Against) -> list[Table]:
    """Return a table for each experiment and metric, in the order of the new records."""
    split: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in against.comparisons:
        split.setdefault((comparison.new.experiment, comparison.metric), []).append(comparison)
    return [_table(experiment, metric, rows, against.tests) for (experiment, metric), rows in split.items()]


def cell_names(records: Sequence[Record]) -> list[str]:
    """Return the names of cells. Cells of one name also have the steps, or the names of their models."""
    names = [cell_words(record) for record in records]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({_owner(r)})" if name in twice else name for name, r in zip(names, records, strict=True)]


def worst_sentence(against: Against) -> str | None:
    """Return one sentence that names the worst of the significantly worse values, or None."""
    worst = against.worst
    if worst is None or worst.difference is None or worst.corrected is None:
        return None
    others = len(against.of("worse")) - 1
    value, before = (record.metrics[worst.metric].estimate.value for record in (worst.new, worst.old))
    more = f", and {others} more {'value is' if others == 1 else 'values are'} worse" if others else ""
    return (
        f"{cell_words(worst.new)} is significantly worse in {worst.metric}: {before:.5g} → {value:.5g}, difference "
        f"{worst.difference.value:+.3g} [{worst.difference.low:.3g}, {worst.difference.high:.3g}], "
        f"{print_p(worst.corrected, '.2g')} after Holm's correction{more}"
    )


def summary(against: Against) -> dict[str, Any]:
    """Return the comparison less its tables as a JSON value."""
    worst = against.worst
    return {
        "tests": against.tests,
        "better": len(against.of("better")),
        "worse": len(against.of("worse")),
        "not_significant": len(against.of("not significant")),
        "not_compared": [
            {"experiment": c.new.experiment, "cell": cell_words(c.new), "metric": c.metric, "why": c.why_not}
            for c in against.of("not compared")
        ],
        "worst": None if worst is None else {"experiment": worst.new.experiment, "cell": worst.new.cell,
                                             "metric": worst.metric, "sentence": worst_sentence(against)},
        "only_in_new": cell_names(against.only_new),
        "only_in_old": cell_names(against.only_old),
        "metrics_in_one": list(against.metrics_apart),
        "left_out": against.left_out,
    }  # fmt: skip


def _table(experiment: str, metric: str, comparisons: Sequence[Comparison], tests: int) -> Table:
    names = cell_names([comparison.new for comparison in comparisons])
    direction = comparisons[0].direction
    columns = (
        Column("cell", "Cell"),
        Column("old", "Old", "measured", interval=True),
        Column("new", "New", "measured", interval=True),
        Column("difference", "Difference", "measured", direction, interval=True, tested=True),
        Column("result", "Result"),
        Column("test", "Test", in_caption=True),
        Column("n_old", "N old", in_caption=True),
        Column("n_new", "N new", in_caption=True),
        Column("changed", "Changed", in_caption=True),
    )
    changes = ["; ".join(setting_changes(comparison.new, comparison.old)) for comparison in comparisons]
    rows = [_row(*row) for row in zip(names, comparisons, changes, strict=True)]
    place = 3
    corrected = {(r, place): c.corrected for r, c in enumerate(comparisons) if c.corrected is not None}
    number = "1 test" if tests == 1 else f"{tests} tests"
    text = (
        f"New less old, with 95% intervals; {'larger' if direction == 'higher' else 'smaller'} values are better. A "
        f"star marks a difference at the {LEVEL:.0%} level after Holm's correction for the {number} of this "
        "comparison. Printed p-values and intervals are uncorrected."
    )
    return Table(
        GROUP, re.sub(r"[^A-Za-z0-9._]+", "-", f"{experiment}-{metric}"), f"{experiment}: {metric}", text, columns,
        tuple(rows), notes=tuple(_notes(names, comparisons, changes)),
        significant=frozenset(cell for cell, p in corrected.items() if p < LEVEL), corrected=corrected,
    )  # fmt: skip


def _row(name: str, comparison: Comparison, changes: str) -> tuple[Cell, ...]:
    old, new = (record.metrics[comparison.metric].estimate for record in (comparison.old, comparison.new))
    test = None if comparison.difference is None else PAIRED if comparison.paired else INDEPENDENT
    return (name, old, new, comparison.difference, comparison.result, test, old.n, new.n, changes or None)


def _notes(names: Sequence[str], comparisons: Sequence[Comparison], changes: Sequence[str]) -> list[str]:
    """Return sentences on the tests, on values that cannot be compared, and on changed settings."""
    how = [
        None if c.difference is None else
        f"The test is {PAIRED}" if c.paired else
        "The test takes the intervals of old and new as independent"
        for c in comparisons
    ]  # fmt: skip
    why = [None if c.why_not is None else f"Not compared ({c.why_not})" for c in comparisons]
    changed = [f"Changed settings ({text})" if text else "No setting changed" for text in changes]
    return [*_gathered(names, how), *_gathered(names, why), *_gathered(names, changed)]


def _gathered(names: Sequence[str], texts: Sequence[str | None]) -> list[str]:
    """Return each text once, with the names of the rows that it holds for."""
    cells: dict[str, list[str]] = {}
    for name, text in zip(names, texts, strict=True):
        if text is not None:
            cells.setdefault(text, []).append(name)
    everywhere = "all cells" if len(names) > 1 else names[0] if names else ""
    return [f"{text}: {everywhere if len(held) == len(names) else '; '.join(held)}." for text, held in cells.items()]


def _owner(record: Record) -> str:
    """Return what tells cells of one name apart: the number of steps, or the models."""
    steps = record.cell.get("steps")
    models = ", ".join(system.reference for system in record.systems.values())
    return f"{steps} steps, {models}" if steps is not None else models
