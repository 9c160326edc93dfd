"""The Vendi score against its definition and sets whose score is known."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_eval.statistics import group_labels
from ddil_eval.statistics.vendi import Vendi


def by_definition(features: np.ndarray) -> float:
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(units @ units.T / len(units))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(("n", "d"), [(6, 20), (20, 20), (90, 7)])
def test_the_score_is_its_definition(n: int, d: int) -> None:
    features = np.random.default_rng(0).normal(size=(n, d)) + 0.5
    assert Vendi().values(features)[0] == pytest.approx(by_definition(features), rel=1e-9)


@pytest.mark.parametrize("copies", [1, 9])
def test_pictures_with_nothing_in_common_count_one_each(copies: int) -> None:
    """Five orthogonal directions, each any number of times, at any length."""
    features = np.repeat(np.diag([1.0, 2.0, 3.0, 4.0, 5.0]), copies, axis=0)
    assert Vendi().values(features)[0] == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 3), (50, 3)])
@pytest.mark.parametrize("fill", [0.0, 2.0])
def test_equal_pictures_count_as_one(n: int, d: int, fill: float) -> None:
    assert Vendi().values(np.full((n, d), fill))[0] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("d", [4, 80])
def test_leaving_a_group_out_is_measuring_the_others(d: int) -> None:
    features, labels = np.random.default_rng(1).normal(size=(60, d)), group_labels(60)
    replicates = np.array([Vendi().values(features[labels != group])[0] for group in range(20)])
    spread = Vendi().spread(features, labels)
    np.testing.assert_allclose(spread.pseudovalues[:, 0], 20 * Vendi().values(features)[0] - 19 * replicates, rtol=1e-8)
