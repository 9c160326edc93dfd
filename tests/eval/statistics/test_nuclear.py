"""Nuclear norms without a group, against a singular value decomposition of the rows that remain."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_eval.statistics import FrechetReference, group_labels
from ddil_eval.statistics.jackknife import pseudovalues
from ddil_eval.statistics.nuclear import nuclear_norms_without


def norm_of(rows: np.ndarray) -> float:
    return float(np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False).sum())


def decaying(n: int, power: float) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n, n)) * np.arange(1.0, n + 1) ** -power


NORMAL = np.random.default_rng(0).normal(size=(120, 150))
ROWS = {
    "more columns than rows": NORMAL[:60],
    "as many columns": NORMAL[:, :120],
    "few columns": NORMAL[:, :12],
    "nearly as many columns as rows": NORMAL[:, :115],
    "columns that decay": decaying(100, 2.0),
    "columns that decay quickly": np.random.default_rng(2).normal(size=(60, 60)) * np.exp(-np.arange(60.0)),
    "rank one": np.outer(NORMAL[0], NORMAL[1]),
    "each row twice": np.repeat(NORMAL[:50], 2, axis=0),
    "one row in each group": NORMAL[:20],
    "four rows": NORMAL[:4],
    "large and far from 0": 1e9 * NORMAL + 1e10,
    "tiny": 1e-30 * NORMAL,
}


@pytest.mark.parametrize("name", ROWS)
def test_the_norms_are_those_of_the_rows_that_remain(name: str) -> None:
    rows = ROWS[name]
    labels = group_labels(len(rows))
    norm, norms = nuclear_norms_without(rows, labels)
    expected = [norm_of(rows[labels != group]) for group in range(labels.max() + 1)]
    assert norm == pytest.approx(norm_of(rows), rel=1e-12)
    np.testing.assert_allclose(norms, expected, rtol=0, atol=1e-11 * norm)


def test_the_norms_of_unequal_groups() -> None:
    labels = np.repeat([0, 1, 2], [1, 40, 79])
    norm, norms = nuclear_norms_without(NORMAL, labels)
    expected = [norm_of(NORMAL[labels != group]) for group in range(3)]
    np.testing.assert_allclose(norms, expected, rtol=0, atol=1e-11 * norm)


def test_equal_rows_have_the_norm_zero() -> None:
    norm, norms = nuclear_norms_without(np.ones((40, 50)), group_labels(40))
    assert norm == 0 and norms.tolist() == [0.0] * 20


@pytest.mark.parametrize(("n", "m", "d"), [(60, 500, 100), (60, 30, 100), (64, 64, 64), (4, 9, 20)])
def test_the_interval_of_a_distance_is_that_of_its_subsets(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(3)
    x, reference = rng.normal(size=(n, d)) + 100.3, FrechetReference(1.2 * rng.normal(size=(m, d)) + 100)
    labels = group_labels(n, seed=2)
    spread, distance = reference.spread(x, labels), reference.subset_distance(x)
    replicates = np.array([[distance(np.flatnonzero(labels != group))] for group in range(labels.max() + 1)])
    np.testing.assert_allclose(spread.values, distance(np.arange(n)), rtol=1e-10)
    np.testing.assert_allclose(spread.pseudovalues, pseudovalues(spread.values, replicates, labels), rtol=1e-8)
