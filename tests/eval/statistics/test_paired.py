"""The paired test against SciPy's permutation test and t-interval."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.paired import paired_difference, sign_flip_p_value


@pytest.mark.parametrize(("n", "shift"), [(2, 0.0), (5, 1.0), (9, 0.4), (12, 0.0)])
def test_the_p_value_is_the_share_of_all_signs(n: int, shift: float) -> None:
    differences = np.random.default_rng(n).normal(shift, 1.0, n)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=n)]
    expected = np.mean(np.array(sums) >= abs(differences.sum()) * (1 - 1e-12))
    assert sign_flip_p_value(differences) == pytest.approx(expected, rel=1e-12)
    scipy = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2**n)
    assert sign_flip_p_value(differences) == pytest.approx(float(scipy.pvalue), rel=1e-9)


def test_twenty_seeds_reach_the_smallest_p_value() -> None:
    assert sign_flip_p_value(np.linspace(0.1, 2, 20)) == 2**-19
    assert sign_flip_p_value(-np.linspace(0.1, 2, 40)) == 2**-39
    assert sign_flip_p_value(np.zeros(20)) == sign_flip_p_value(np.array([1.0, -1.0])) == 1.0


def test_the_interval_is_students() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1.0, 20)
    found = paired_difference(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (found.value, found.n) == (pytest.approx(differences.mean()), 20)


@pytest.mark.parametrize(("values", "said"), [([1.0], "are 2 to 40, not 1"), ([1.0, np.nan], "is not finite")])
def test_differences_that_cannot_be_tested_are_refused(values: list[float], said: str) -> None:
    with pytest.raises(DdilError, match=said):
        paired_difference(np.array(values))
