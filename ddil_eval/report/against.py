"""Two results folders side by side: for every cell in both, is the new value better, worse, or not shown to differ?"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ddil_eval.report.comparisons import LEVEL, holm, is_sound
from ddil_eval.report.records import Direction, Record, RecordedEstimate, latest_records
from ddil_eval.report.setting_changes import obstacle, setting_changes
from ddil_eval.statistics.estimate import Estimate, estimate_mean
from ddil_eval.statistics.independent import independent_difference
from ddil_eval.statistics.jackknife import GROUPS

LEFT_OUT = frozenset(
    {"difference", "pair", "effect", "inverter-difference", "drift-difference", "drift-group-difference"}
    | {"drift-group-spread", "drift-group-difference-spread", "drift-ratios"}
)
"""Kinds of cells that are differences, spreads or logarithms of others. They are not compared, since the others are."""

Result = Literal["better", "worse", "not significant", "not compared"]
Scores = Callable[[Record, str], "np.ndarray | None"]
"""Returns the scores [n] of a record's metric, one for each prompt, or None where they are not kept."""
IsRate = Callable[[str], bool]
"""Whether the scores of a metric are shares."""


@dataclass(frozen=True)
class Comparison:
    """One metric of one cell in both folders.

    Attributes:
        metric: The name of the metric.
        new: The record of the results.
        old: The record of the results to compare with.
        difference: New less old, with its p-value; None where the values cannot be compared.
        paired: Whether the test compares the scores of each prompt.
        why_not: Why the values cannot be compared, or None.
        corrected: The p-value after Holm's correction for all tests of the comparison, or None.
    """

    metric: str
    new: Record
    old: Record
    difference: RecordedEstimate | None = None
    paired: bool = False
    why_not: str | None = None
    corrected: float | None = None

    @property
    def direction(self) -> Direction:
        """Which values are better."""
        return self.new.metrics[self.metric].direction

    @property
    def result(self) -> Result:
        """Whether the new value is significantly better or worse."""
        if self.difference is None or self.corrected is None:
            return "not compared"
        if self.corrected >= LEVEL:
            return "not significant"
        return "better" if (self.difference.value > 0) == (self.direction == "higher") else "worse"

    @property
    def half_widths(self) -> float:
        """How many half-widths of its interval the difference lies from 0."""
        if self.difference is None or self.difference.value == 0:
            return 0.0
        value = self.difference.value
        half = value - self.difference.low if value > 0 else self.difference.high - value
        return abs(value) / half if half > 0 else float("inf")


@dataclass(frozen=True)
class Against:
    """The comparison of two results folders.

    Attributes:
        comparisons: One for each metric that both records of a cell hold.
        only_new: Records of cells that only the new results hold.
        only_old: Records of cells that only the old results hold.
        metrics_apart: Metrics that one record of a cell lacks, in words.
        left_out: The number of cells that are differences or spreads of other cells, in the new results.
    """

    comparisons: tuple[Comparison, ...]
    only_new: tuple[Record, ...]
    only_old: tuple[Record, ...]
    metrics_apart: tuple[str, ...]
    left_out: int

    def of(self, result: Result) -> list[Comparison]:
        """Return the comparisons with this result."""
        return [comparison for comparison in self.comparisons if comparison.result == result]

    @cached_property
    def tests(self) -> int:
        """The number of tests."""
        return sum(comparison.corrected is not None for comparison in self.comparisons)

    @cached_property
    def worst(self) -> Comparison | None:
        """The significantly worse value that lies the most half-widths from the old one, or None."""
        return max(self.of("worse"), key=lambda comparison: comparison.half_widths, default=None)


def compare_results(
    new: Iterable[Record], old: Iterable[Record], new_scores: Scores, old_scores: Scores, is_rate: IsRate
) -> Against:
    """Compare the newest record of each cell in two folders.

    A test is paired where both sides keep the scores of the same prompts. Otherwise it takes the two intervals as
    independent. Holm's method corrects for all tests together.

    Args:
        new: The records of the new results.
        old: The records of the results to compare with.
        new_scores: Finds the scores of single prompts in the new results.
        old_scores: The same for the old results.
        is_rate: Whether the scores of a metric are shares.
    """
    newest, older = latest_records(new)[0], latest_records(old)[0]
    pairs, only_new, only_old = match_cells(*([r for r in side if r.kind not in LEFT_OUT] for side in (newest, older)))
    comparisons, apart = [], []
    for after, before in pairs:
        for metric in sorted(after.metrics.keys() ^ before.metrics.keys()):
            apart.append(f"{cell_words(after)}: only the {'new' if metric in after.metrics else 'old'} has {metric}")
        for metric in (name for name in after.metrics if name in before.metrics):
            scores = new_scores(after, metric), old_scores(before, metric)
            comparisons.append(_compare(after, before, metric, scores, is_rate(metric)))
    corrected = holm({i: c.difference.p_value for i, c in enumerate(comparisons)
                      if c.difference is not None and c.difference.p_value is not None})  # fmt: skip
    tested = [replace(c, corrected=corrected.get(i)) for i, c in enumerate(comparisons)]
    left_out = sum(record.kind in LEFT_OUT for record in newest)
    return Against(tuple(tested), tuple(only_new), tuple(only_old), tuple(apart), left_out)


def match_cells(
    new: Sequence[Record], old: Sequence[Record]
) -> tuple[list[tuple[Record, Record]], list[Record], list[Record]]:
    """Pair the records of the same cells, and return those without a partner: of ``new``, then of ``old``.

    Where a folder holds a cell several times, such as for two students, the pairs with the fewest changed settings
    come first.
    """
    by_cell: dict[str, tuple[list[Record], list[Record]]] = {}
    for side, records in enumerate((new, old)):
        for record in records:
            by_cell.setdefault(_cell_key(record), ([], []))[side].append(record)
    pairs = list[tuple[Record, Record]]()
    for members in by_cell.values():
        candidates = sorted(itertools.product(*members), key=lambda pair: len(setting_changes(*pair)))
        taken = set[int]()
        for pair in candidates:
            if not taken & {id(record) for record in pair}:
                taken |= {id(record) for record in pair}
                pairs.append(pair)
    paired = {id(record) for pair in pairs for record in pair}
    return pairs, [r for r in new if id(r) not in paired], [r for r in old if id(r) not in paired]


def cell_words(record: Record) -> str:
    """Return the name of a cell in words, as in "p_teacher = 0.8"."""
    cell, kind = record.cell, record.kind
    names = {
        "pure": "pure {model}", "p_teacher": "p_teacher = {p_teacher}", "string": "string {string}",
        "teacher_then_student": "teacher until t = {switch_t}", "student_then_teacher": "student until t = {switch_t}",
    }  # fmt: skip
    if kind in names:
        return names[kind].format_map(cell)
    if kind in ("system", "inverter"):
        return str(cell["name"])
    rest = ", ".join(f"{key} = {value}" for key, value in cell.items() if key != "kind")
    return f"{kind}, {rest}" if rest else kind


def _cell_key(record: Record) -> str:
    """Return what names a cell: its experiment and entries. The name of the paper's row does not count."""
    cell: Mapping[str, object] = {key: value for key, value in record.cell.items() if key != "paper"}
    return json.dumps([record.experiment, cell], sort_keys=True)


def _compare(
    new: Record, old: Record, metric: str, scores: tuple[np.ndarray | None, np.ndarray | None], rate: bool
) -> Comparison:
    after, before = new.metrics[metric].estimate, old.metrics[metric].estimate
    why_not = obstacle(new, old, metric)
    for side, estimate in (("new", after), ("old", before)):
        if why_not is None and not is_sound(estimate):
            why_not = f"the {side} value is not reliable: {estimate.note}"
    if why_not is not None:
        return Comparison(metric, new, old, why_not=why_not)
    first, second = scores
    if first is not None and second is not None and _same_prompts(new, old) and len(first) == len(second) >= 2:
        found = estimate_mean(np.stack([first, second], axis=1), np.array([1.0, -1.0]), rate=rate)
        return Comparison(metric, new, old, _recorded(found), paired=True)
    degrees = min(_degrees(record, metric) for record in (new, old))
    return Comparison(metric, new, old, _recorded(independent_difference(after, before, degrees)))


def _degrees(record: Record, metric: str) -> float:
    """Return the degrees of freedom of a value.

    Its record names those over training seeds and prompts. Otherwise they are one less than the number of prompts, of
    groups of prompts or of training seeds.
    """
    measured, seeds = record.metrics[metric], record.cell.get("training_seeds")
    if measured.estimate.degrees is not None:
        return measured.estimate.degrees
    most = GROUPS if measured.kind in ("set", "alone") else measured.estimate.n
    return max(1, min(most, measured.estimate.n, seeds if isinstance(seeds, int) else most) - 1)


def _same_prompts(new: Record, old: Record) -> bool:
    """Whether two records were measured on the same prompts in the same order."""
    ids = new.data.get("prompt_ids_sha256")
    return ids is not None and all(new.data.get(k) == old.data.get(k) for k in ("prompt_ids_sha256", "captions_sha256"))


def _recorded(estimate: Estimate) -> RecordedEstimate:
    return RecordedEstimate.model_validate(estimate)
