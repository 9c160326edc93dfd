"""Marks in tables are corrected for the number of tests, and mark only values that can be compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from ddil_eval.report import rendering as render
from ddil_eval.report.comparisons import holm, is_sound, p_value, unpaired_p_value
from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric
from ddil_eval.report.table_type import Table
from ddil_eval.report.tables import build
from tests.records import record, system

NOTE = "a limit from 39 pictures is not to be trusted"


def estimate(
    value: float, half: float = 0.5, p: float | None = None, n: int = 256, note: str | None = None
) -> RecordedEstimate:
    return RecordedEstimate(value=value, low=value - half, high=value + half, n=n, p_value=p, note=note)


def lower_is_better(found: RecordedEstimate, network: str | None = None) -> dict[str, RecordedMetric]:
    told = None if network is None else {"name": network}
    return {"fd_efflite0": RecordedMetric(estimate=found, direction="lower", kind="set", network=told)}


def difference(a: str, b: str, found: RecordedEstimate, kind: str = "difference") -> Record:
    cell = {"kind": kind, "name": f"{a} − {b}", "of": [a, b]}
    return record(cell, experiment="systems", nfe=None, systems={}, metrics=lower_is_better(found))


def table_of(records: list[Record], name: str) -> Table:
    return next(table for table in build(records) if table.name == name)


def test_holm_s_p_values_are_those_of_the_step_down_test() -> None:
    """Rejecting where they are below α is what the definition does: test the k-th smallest of m at α / (m − k + 1), and stop."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = dict(enumerate(rng.beta(0.3, 1, size=rng.integers(1, 12)) * rng.choice([1, 0.1])))
        corrected, m, open_still = holm(found), len(found), True
        for k, (place, p) in enumerate(sorted(found.items(), key=lambda item: item[1])):
            open_still = open_still and p * (m - k) < 0.05
            assert (corrected[place] < 0.05) == open_still and p <= corrected[place] <= 1
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {}


def test_an_interval_implies_a_p_value_where_there_is_none() -> None:
    assert p_value(estimate(1.0, 0.5)) == pytest.approx(2 * scipy.stats.norm.sf(2 * scipy.stats.norm.ppf(0.975)))
    assert p_value(estimate(-1.0, 1.0)) == pytest.approx(0.05) and p_value(estimate(0.0, 0.0)) == 1.0
    assert (
        p_value(RecordedEstimate(value=1.0, low=-0.1, high=1.1, n=9))
        > 0.05
        > p_value(RecordedEstimate(value=1.0, low=0.1, high=9.0, n=9))
    )
    assert p_value(estimate(1.0, 0.5, p=0.3)) == 0.3
    assert unpaired_p_value(estimate(1.0), estimate(2.1)) < 0.05 < unpaired_p_value(estimate(1.9), estimate(1.0))


@pytest.mark.parametrize("count", [1, 2, 20])
def test_stars_are_corrected_for_the_tests_of_the_table(count: int) -> None:
    """One difference with p = 0.02 among others without any: it is starred where it is the only test."""
    found = [0.02, *[0.5] * (count - 1)]
    table = table_of([difference(f"s{i:02d}", "t", estimate(-1.0, p=p)) for i, p in enumerate(found)], "differences")
    assert table.significant == (frozenset({(0, 1)}) if count * 0.02 < 0.05 else frozenset())
    assert table.corrected[0, 1] == pytest.approx(min(1.0, 0.02 * count))
    assert f"after Holm's correction for the table's {count} test{'s' * (count > 1)}. " in table.caption
    for text in (render.to_latex(table), json.dumps(render.to_dict(table))):
        assert "Holm's correction" in text
    assert "fd_efflite0_p_holm" in render.to_csv(table).splitlines()[0]
    assert render.to_dict(table)["rows"][0]["fd_efflite0_p_holm"] == table.corrected[0, 1]


def test_hardly_a_table_of_equal_systems_has_a_star() -> None:
    """Of 200 tables of 20 tests whose p-values are even, as of cells that do not differ, about 5 % have any star."""
    rng = np.random.default_rng(1)
    starred = [min(holm(dict(enumerate(rng.random(20)))).values()) < 0.05 for _ in range(2000)]
    assert np.mean(starred) == pytest.approx(0.05, abs=0.02)


def test_bold_is_corrected_for_the_number_of_columns() -> None:
    def both(fd: float, right: float, p: float | None = None) -> dict[str, RecordedMetric]:
        return lower_is_better(estimate(fd, p=p)) | {
            "drawn_right": RecordedMetric(estimate=estimate(right, p=p), direction="higher", kind="mean")
        }

    systems = [system("a", 4, metrics=both(12.0, 0.9)), system("b", 4, metrics=both(13.0, 0.5))]
    cell = {"kind": "pair", "name": "a − b", "of": ["a", "b"]}
    for p, bold in ((0.02, 2), (0.03, 0)):
        pair = record(cell, experiment="systems", nfe=None, systems={}, metrics=both(-1.0, 0.4, p))
        table = table_of([*systems, pair], "systems")
        assert len(table.best) == bold and "after Holm's correction for the number of columns" in table.caption


@pytest.mark.parametrize(
    ("other", "network"),
    [
        (estimate(12.0, n=100), "one"),  # a distance of fewer pictures
        (estimate(12.0), "another"),  # features of other weights
        (estimate(12.0, note=NOTE), "one"),
        (estimate(188.6, 0.0, note=NOTE), "one"),
    ],
)
def test_what_was_not_measured_alike_neither_wins_nor_loses(other: RecordedEstimate, network: str) -> None:
    healthy = system("a", 4, metrics=lower_is_better(estimate(20.0), "one"))
    assert table_of([healthy, system("b", 4, metrics=lower_is_better(other, network))], "systems").best == frozenset()
    alike = system("b", 4, metrics=lower_is_better(estimate(12.0), "one"))
    assert len(table_of([healthy, alike], "systems").best) == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_marked(broken: float) -> None:
    """A record does not hold such a value; a table that is given one all the same marks nothing by it."""
    hollow = RecordedEstimate.model_construct(value=broken, low=broken, high=broken, n=256, p_value=0.0001, note=None)
    assert not is_sound(hollow) and is_sound(estimate(1.0))
    measured = RecordedMetric.model_construct(estimate=hollow, direction="lower", kind="set", network=None)
    poisoned = system("b", 4).model_copy(update={"metrics": {"fd_efflite0": measured}})
    assert table_of([system("a", 4, right=None), poisoned], "systems").best == frozenset()
    apart = difference("a", "b", estimate(1.0, p=0.01)).model_copy(update={"metrics": {"fd_efflite0": measured}})
    table = table_of([apart, difference("c", "d", estimate(1.0, p=0.04))], "differences")
    assert table.significant == frozenset({(1, 1)})  # and does not count among the tests


def test_an_older_difference_of_the_same_names_says_nothing() -> None:
    systems = [system(name, 4, fd=fd, right=None) for name, fd in (("a", 13.0), ("b", 12.9))]
    assert table_of([*systems, difference("a", "b", estimate(0.1, 0.05, 0.001))], "systems").best != frozenset()
    assert table_of([*systems, difference("a", "b", estimate(0.4, 0.05, 0.001))], "systems").best == frozenset()


def test_a_value_that_is_not_to_be_trusted_says_so_wherever_it_is_printed() -> None:
    doubtful = difference("a", "b", estimate(-3.0, p=0.0001, note=NOTE))
    table = table_of([doubtful, difference("c", "d", estimate(-3.0, p=0.0001))], "differences")
    assert table.significant == frozenset({(1, 1)})
    assert f"† {NOTE}" in table.notes
    assert "$-3.00^{\\dagger}$" in render.to_latex(table) and f"$\\dagger$ {NOTE}" in render.to_latex(table)
    rows = render.to_dict(table)["rows"]
    assert [row["fd_efflite0_note"] for row in rows] == [NOTE, None] and NOTE in render.to_csv(table)
    assert "_note" not in render.to_csv(replace(table, columns=tuple(replace(c, noted=False) for c in table.columns)))
