"""Moments in one pass: against NumPy on all features at once, and merged from shards."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_core.support.errors import DdilError
from ddil_eval.statistics import FrechetReference, GroupMoments, Moments, group_labels


def features_of(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3


@pytest.mark.parametrize(("n", "d"), [(1, 4), (4, 4), (5, 4), (40, 64), (3000, 8)])
def test_moments_are_those_of_numpy(n: int, d: int) -> None:
    features = features_of(n, d).astype(np.float32)
    moments, exact = Moments.of(features), features.astype(np.float64)
    centred = exact - exact.mean(axis=0)
    assert moments.count == n and (moments.rows is not None) == (n <= d)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.full_scatter(), centred.T @ centred, atol=1e-10 * n * d)
    if n > 1:
        covariance = np.cov(exact, rowvar=False)
        factor = moments.factor()
        np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-10 * np.abs(covariance).max())
        assert moments.trace() == pytest.approx(np.trace(covariance), rel=1e-12)


def test_moments_do_not_depend_on_the_mean_s_size() -> None:
    features = features_of(2000, 6)
    far = Moments.of(features + 1e6).full_scatter()
    np.testing.assert_allclose(far, Moments.of(features).full_scatter(), rtol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(30, 40), (60, 40), (700, 16)])
@pytest.mark.parametrize("shards", [2, 3])
def test_batches_in_another_order_give_the_numbers_of_one_pass(n: int, d: int, shards: int) -> None:
    features, labels = features_of(n, d), group_labels(n)
    whole = GroupMoments.of(features, labels)
    batched = GroupMoments(20, d)
    for shard in range(shards):
        rows = np.arange(shard, n, shards)
        for batch in np.array_split(rows, max(1, len(rows) // (3 + shard))):
            batched.add(features[batch], labels[batch])
    reference = FrechetReference(features_of(90, d, seed=1))
    one, many = (reference.spread_of(moments, labels) for moments in (whole, batched))
    np.testing.assert_allclose(many.values, one.values, rtol=1e-10)
    np.testing.assert_allclose(many.pseudovalues, one.pseudovalues, rtol=1e-8)
    assert many.values[0] == pytest.approx(reference.distance(features), rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(41, 40), (400, 12)])
def test_leaving_a_group_out_is_measuring_the_others(n: int, d: int) -> None:
    features, labels = features_of(n, d), group_labels(n, seed=3)
    for group, others in enumerate(GroupMoments.of(features, labels).leave_one_out()[1]):
        alone = Moments.of(features[labels != group])
        assert others.count == alone.count
        np.testing.assert_allclose(others.mean, alone.mean, rtol=1e-10)
        np.testing.assert_allclose(others.full_scatter(), alone.full_scatter(), atol=1e-9 * alone.full_scatter().max())


def test_an_interval_from_moments_is_that_from_features() -> None:
    features, labels = features_of(300, 10), group_labels(300)
    reference = FrechetReference(features_of(200, 10, seed=1))
    spread = reference.spread(features, labels)
    distance = reference.subset_distance(features)
    replicates = np.array([distance(np.flatnonzero(labels != group)) for group in range(20)])
    np.testing.assert_allclose(spread.pseudovalues[:, 0], 20 * spread.values[0] - 19 * replicates, rtol=1e-8)


def test_features_that_are_not_numbers_are_refused() -> None:
    features = features_of(10, 3)
    features[4, 1] = np.inf
    with pytest.raises(DdilError, match="not finite; check the measured images"):
        Moments.of(features)
    with pytest.raises(DdilError, match="not finite"):
        GroupMoments.of(features, group_labels(10))
    with pytest.raises(DdilError, match=r"at least one image, not \[0, 3\]"):
        Moments.of(features[:0])
