"""p-values of paired differences, against exact tests and under no difference."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import scipy.stats

from ddil_eval.statistics import FrechetReference, bootstrap_mean, jackknife
from ddil_eval.statistics.estimate import permutation_p


def mean_of(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return values[rows].mean(axis=0)


def test_only_a_difference_has_a_p_value() -> None:
    scores = np.random.default_rng(23).normal(size=(50, 3))
    cells = jackknife(partial(mean_of, scores), 50)
    for estimate in (bootstrap_mean(scores, [0, 1, 0]), cells.estimate([0, 1, 0])):
        assert estimate.p_value is None
    for estimate in (bootstrap_mean(scores, [0.5, 0.5, -1]), cells.estimate([0.5, 0.5, -1])):
        assert estimate.p_value is not None and 0 < estimate.p_value <= 1


def test_the_permutation_test_counts_signs() -> None:
    differences = np.array([0.9, -0.2, 0.5, 1.1, 0.0, 0.3, -0.1, 0.7, 0.4])
    sums = np.array([np.dot(signs, differences) for signs in product([-1, 1], repeat=9)])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12)
    assert permutation_p(differences, permutations=40000) == pytest.approx(exact, abs=0.005)


def test_the_permutation_test_of_rights_and_wrongs_is_mcnemar_s() -> None:
    rng = np.random.default_rng(24)
    right = rng.random((200, 2)) < [0.6, 0.7]
    only_first, only_second = (int((right[:, a] & ~right[:, b]).sum()) for a, b in ((0, 1), (1, 0)))
    exact = scipy.stats.binomtest(only_first, only_first + only_second).pvalue
    found = bootstrap_mean(right, [1, -1]).p_value
    assert found == pytest.approx(exact, abs=0.015)


def test_equal_cells_do_not_differ() -> None:
    scores = np.repeat(np.random.default_rng(25).normal(size=(30, 1)), 2, axis=1)
    assert bootstrap_mean(scores, [1, -1]).p_value == 1
    same = jackknife(partial(mean_of, scores), 30).estimate([1, -1])
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_the_p_value_of_a_jackknifed_mean_is_that_of_the_paired_t_test() -> None:
    scores = np.random.default_rng(26).normal((0.0, 0.3), size=(40, 2))
    found = jackknife(partial(mean_of, scores), 40, groups=40).estimate([1, -1])
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(scores[:, 0], scores[:, 1]).pvalue, rel=1e-9)
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)


def test_p_values_of_cells_that_do_not_differ_are_even() -> None:
    """Of two cells of one distribution on shared prompts, a share of about p has a p-value below p; both lie off the reference."""
    rng = np.random.default_rng(27)
    reference = FrechetReference(rng.normal(size=(400, 4)))
    means, sets = [], []
    for seed in range(200):
        shared = rng.normal(size=(60, 4))
        cells = [0.5 + 0.8 * shared + 0.6 * rng.normal(size=(60, 4)) for _ in range(2)]
        means.append(bootstrap_mean(np.stack([x[:, 0] for x in cells], axis=1), [1, -1], seed, resamples=50).p_value)
        distances = [reference.subset_distance(x) for x in cells]
        found = jackknife(lambda rows, of=distances: np.array([distance(rows) for distance in of]), 60, seed=seed)
        sets.append(found.estimate([1, -1]).p_value)
    for values in (means, sets):
        assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.045)
        assert np.mean(np.array(values) < 0.5) == pytest.approx(0.5, abs=0.11)


def test_the_permutation_test_sees_a_difference() -> None:
    rng = np.random.default_rng(28)
    common = rng.normal(size=(100, 1))
    scores = np.concatenate([common, common + 0.2 + 0.1 * rng.normal(size=(100, 1))], axis=1)
    found = bootstrap_mean(scores, [-1, 1])
    assert found.p_value == pytest.approx(1e-4) and found.low > 0
