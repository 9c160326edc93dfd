"""KID and CMMD against torch-fidelity, sums written out, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_core.support.errors import DdilError
from ddil_eval.statistics import Jackknife, group_labels
from ddil_eval.statistics.kernels import GaussianDiscrepancy, KernelDistance, polynomial


def sets(n: int, m: int, d: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + 0.3, rng.normal(size=(m, d))


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return (x @ y / len(x) + 1) ** 3


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """MMD² by the double sums of its definition."""
    n, m = len(x), len(y)
    xx = sum(cubic(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(cubic(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(cubic(a, b) for a in x for b in y) / (n * m)


def test_kid_of_whole_sets_is_its_definition() -> None:
    x, y = sets(12, 12)
    assert KernelDistance(y).values(x)[0] == pytest.approx(unbiased(x, y), rel=1e-12)


def test_kid_is_torch_fidelity_s() -> None:
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = sets(300, 300, d=64)
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=3, kid_subset_size=300, verbose=False
    )
    assert KernelDistance(y).values(x)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


def test_kid_is_a_mean_over_a_hundred_subsets_of_a_thousand() -> None:
    x, y = sets(1010, 1020, d=4)
    spread = KernelDistance(y).spread(x, group_labels(len(x)))
    assert spread.draws is not None and spread.draws.shape == (100, 1)
    assert spread.values[0] == pytest.approx(spread.draws.mean(), rel=1e-12)
    assert KernelDistance(y, seed=1).values(x)[0] != spread.values[0]


def test_kid_has_no_bias() -> None:
    """Between samples of one distribution it is 0 in the mean, for any number of samples."""
    found = [KernelDistance(y).values(x - 0.3)[0] for x, y in (sets(10, 15, d=4, seed=seed) for seed in range(300))]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_cmmd_is_its_definition() -> None:
    x, y = (unit(features) for features in sets(7, 9))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a]))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert GaussianDiscrepancy(y).values(x)[0] == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_two_points_has_its_closed_form() -> None:
    """Sets of equal points, √2 apart: 1,000 · (2 − 2 exp(−2 / 200))."""
    x, y = np.tile([1.0, 0.0], (5, 1)), np.tile([0.0, 1.0], (4, 1))
    assert GaussianDiscrepancy(y).values(x)[0] == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-10)


@pytest.mark.parametrize("statistic", [KernelDistance, GaussianDiscrepancy])
@pytest.mark.parametrize("n", [2, 3, 40])
def test_nothing_is_lost_between_equal_and_constant_sets(statistic: type, n: int) -> None:
    constant = np.full((n, 8), 0.5)
    assert statistic(constant).values(constant)[0] == pytest.approx(0, abs=1e-10)
    x, _ = sets(n, 2)
    assert np.isfinite(statistic(x).values(x)).all()
    assert GaussianDiscrepancy(x).values(x)[0] == pytest.approx(0, abs=1e-9)


def test_arguments_may_change_places() -> None:
    x, y = sets(30, 30)
    for statistic in (KernelDistance, GaussianDiscrepancy):
        assert statistic(y).values(x)[0] == pytest.approx(statistic(x).values(y)[0], rel=1e-9)


@pytest.mark.parametrize("statistic", [KernelDistance, GaussianDiscrepancy])
def test_leaving_a_group_out_is_measuring_the_others(statistic: type) -> None:
    """All of 40 samples lie in each KID subset, so that its point and its replicates are one statistic."""
    x, y = sets(40, 60)
    labels = group_labels(40)
    measured = statistic(y)
    spread = measured.spread(x, labels)
    full = [x, *(x[labels != group] for group in range(20))]
    if statistic is GaussianDiscrepancy:
        values = np.array([measured.values(kept)[0] for kept in full])
        assert spread.values[0] == pytest.approx(values[0], rel=1e-12)
    else:
        values = np.array([unbiased(kept, y) for kept in full])
    pseudovalues = 20 * values[0] - 19 * values[1:]
    np.testing.assert_allclose(spread.pseudovalues[:, 0] - spread.values[0], pseudovalues - values[0], atol=1e-9)


def like_inception(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Positive features float32 [n, 2048] with a mean of about 0.4, many of them 0."""
    scale = np.linspace(0.1, 0.8, 2048)
    return np.maximum(scale * np.random.default_rng(seed).normal(size=(n, 2048)) + 0.3 + shift, 0).astype(np.float32)


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_products_in_float32_change_the_distances_by_less_than_1e_8(shift: float) -> None:
    """Two orders below the smallest spread between sets: at n = 300, KID's standard error is about 1e-4."""
    x, y = like_inception(300, 0, shift), like_inception(400, 1)
    for statistic, bound in ((KernelDistance, 1e-8), (GaussianDiscrepancy, 1e-6)):
        first, second = (unit(x), unit(y)) if statistic is GaussianDiscrepancy else (x, y)
        labels = group_labels(300)
        half = statistic(second).spread(first, labels)
        full = statistic(second.astype(np.float64)).spread(first.astype(np.float64), labels)
        np.testing.assert_allclose(half.values, full.values, rtol=0, atol=bound)
        np.testing.assert_allclose(half.pseudovalues, full.pseudovalues, rtol=0, atol=20 * bound)
    assert polynomial(x, y).dtype == np.float64


@pytest.mark.parametrize(("mean", "most"), [(1.0, 0.01), (10.0, 0.01), (100.0, 0.25)])
def test_products_of_features_far_from_zero_change_kid_by_less_than_it_is_uncertain(mean: float, most: float) -> None:
    rng = np.random.default_rng(0)
    x, y = ((rng.normal(size=(300, 1024)) + mean).astype(np.float32) for _ in range(2))
    labels = group_labels(300)
    half, full = (KernelDistance(b).spread(a, labels) for a, b in ((x, y), (x.astype(float), y.astype(float))))
    error = np.std(full.pseudovalues) / np.sqrt(20)
    assert abs(half.values[0] - full.values[0]) < most * error
    np.testing.assert_allclose(half.pseudovalues, full.pseudovalues, rtol=0, atol=most * 20 * error)


class FewSubsets(KernelDistance):
    """So small that single subsets are less work than a pass over all pairs."""

    subsets, size = 3, 20


def test_kid_by_subsets_is_kid_by_one_pass() -> None:
    x, y = sets(1100, 1050)
    spread = FewSubsets(y).spread(x, group_labels(1100))
    assert FewSubsets(y).values(x)[0] == pytest.approx(spread.values[0], rel=1e-10)
    rng = np.random.default_rng([0, 1100, 1050])
    expected = [unbiased(x[rng.choice(1100, 20, replace=False)], y[rng.choice(1050, 20, replace=False)]) for _ in "abc"]
    assert spread.draws is not None
    np.testing.assert_allclose(spread.draws[:, 0], expected, rtol=1e-9)


def test_features_that_are_not_numbers_are_refused() -> None:
    x, y = sets(30, 30)
    x[3, 1] = np.nan
    for statistic in (KernelDistance, GaussianDiscrepancy):
        with pytest.raises(DdilError, match="not finite; check the measured images"):
            statistic(y).spread(x.astype(np.float32), group_labels(30))


@pytest.mark.parametrize("statistic", [KernelDistance, GaussianDiscrepancy])
def test_intervals_cover(statistic: type) -> None:
    rng = np.random.default_rng(7)
    measured = statistic(unit(rng.normal(size=(300, 4))))
    mean = np.array([0.5, 0, 0, 0])
    estimates = []
    for seed in range(150):
        x, labels = unit(rng.normal(size=(80, 4)) + mean), group_labels(80, seed)
        spread = measured.spread(x, labels)
        draws = None if spread.draws is None else spread.draws
        estimates.append(Jackknife(spread.values, spread.pseudovalues, np.bincount(labels), draws).estimate([1]))
    truth = np.mean([estimate.value for estimate in estimates])
    covered = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    assert covered == pytest.approx(0.95, abs=0.05)
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in estimates)


@pytest.mark.parametrize("statistic", [KernelDistance, GaussianDiscrepancy])
def test_too_few_samples_are_refused(statistic: type) -> None:
    with pytest.raises(DdilError, match="at least two images in either set; measure more prompts"):
        statistic(np.zeros((1, 4)))
    with pytest.raises(DdilError, match="at least two images in either set"):
        statistic(np.zeros((3, 4))).values(np.zeros((1, 4)))
