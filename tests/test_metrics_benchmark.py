"""The benchmark of metrics: one small case end to end, its claims, and numbers that do not agree."""

from __future__ import annotations

from dataclasses import replace

import click
import pandas as pd
import pytest

from benchmarks import metrics

PRDC = replace(next(case for case in metrics.CASES if case.metric == "prdc"), count=60, dimensions=8)


def test_a_small_case_is_measured_and_claimed() -> None:
    row = metrics.alternated(PRDC, rounds=2)
    assert row["difference"] <= 1e-9 and row["N"] == 60 and row["d"] == 8
    claim = metrics.summary(pd.DataFrame([row]))[0]
    assert claim.claim == "prdc at N = 60, d = 8, against prdc, CPU seconds"
    assert claim.bar == 1.0 and claim.quotient == row["ratio"]


def test_numbers_that_do_not_agree_end_the_benchmark() -> None:
    wrong = replace(PRDC, theirs=lambda x, y: metrics.prdc_shares(x, y) + 0.5)
    with pytest.raises(click.ClickException, match=r"by prdc; they differ by more than 1e-05"):
        metrics.alternated(wrong, rounds=1)


def test_a_metric_without_a_peer_has_no_claim() -> None:
    vendi = replace(next(case for case in metrics.CASES if case.metric == "vendi"), count=40, dimensions=8)
    row = metrics.alternated(vendi, rounds=1)
    assert metrics.summary(pd.DataFrame([row])) == [] and row["interval_s"] > 0


def test_a_side_that_the_machine_stopped_is_an_empty_figure() -> None:
    row = metrics.row(PRDC, 60, {"ours": [float("nan")], "peer": [1.0]}, {"peer": 0.5})
    assert pd.isna(row["difference"]) and pd.isna(row["ours_s"]) and row["peer_s"] == 1.0
