"""The difference of two independent values from their intervals: closed forms, and agreement of interval and test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ddil_eval.statistics.estimate import Estimate, score_interval
from ddil_eval.statistics.independent import independent_difference


def test_symmetric_intervals_give_students_test() -> None:
    """Two means with standard errors 3 and 4 have a difference with the standard error 5."""
    degrees, quantile = 19, stats.t.ppf(0.975, 19)
    new, old = (Estimate(m, m - quantile * e, m + quantile * e, 100) for m, e in ((20.0, 3.0), (10.0, 4.0)))
    found = independent_difference(new, old, degrees)
    assert (found.value, found.low, found.high) == pytest.approx((10, 10 - 5 * quantile, 10 + 5 * quantile))
    assert found.p_value == pytest.approx(2 * stats.t.sf(10 / 5, degrees))


def test_wilsons_intervals_give_newcombes_method_10() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table II, example a: 56/70 − 48/80 has [0.0524, 0.3339]."""
    z = stats.norm.ppf(0.975)
    shares = []
    for right, n in ((56, 70), (48, 80)):
        p = right / n
        middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        shares.append(Estimate(p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n), n))
    found = independent_difference(*shares, degrees=10**9)
    assert (found.low, found.high, found.n) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5), 70)
    assert score_interval(0.8, np.sqrt(0.16 / 70), 70, float(z), 1.0)[0] < 0.8  # the same kind of interval


@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.0, 1.0, 3.0])
def test_p_is_below_5_percent_exactly_where_the_interval_excludes_0(shift: float) -> None:
    new, old = Estimate(shift, shift - 0.5, shift + 2.0, 9), Estimate(0.0, -1.5, 0.25, 12)
    found = independent_difference(new, old, 8)
    assert found.p_value is not None
    assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize(("value", "p_value"), [(0.0, 1.0), (0.5, 0.0)])
def test_values_without_a_spread_differ_or_do_not(value: float, p_value: float) -> None:
    found = independent_difference(Estimate(value, value, value, 5), Estimate(0.0, 0.0, 0.0, 5), 4)
    assert (found.low, found.high, found.p_value) == (value, value, p_value)
