"""Precision, recall, density and coverage against the ``prdc`` package and cases with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_core.support.errors import DdilError
from ddil_eval.metrics import METRICS
from ddil_eval.statistics import Estimate, Jackknife, group_labels
from ddil_eval.statistics.estimate import score_interval
from ddil_eval.statistics.neighbours import COLUMNS, Neighbours


def sets(n: int, m: int, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 0.8 * rng.normal(size=(n, d)) + 0.5, rng.normal(size=(m, d))


@pytest.mark.parametrize(("n", "m"), [(60, 90), (300, 200), (1300, 1100), (1024, 2049)])
def test_the_four_shares_are_those_of_prdc(n: int, m: int) -> None:
    from prdc import compute_prdc

    x, y = sets(n, m)
    theirs = compute_prdc(real_features=y, fake_features=x, nearest_k=5)
    ours = dict(zip(COLUMNS, Neighbours(y).values(x), strict=True))
    assert ours == pytest.approx({name: theirs[name] for name in COLUMNS}, abs=1e-12)
    assert 0.1 < min(ours["precision"], ours["recall"], ours["coverage"]) < 0.99


def test_leaving_a_group_out_is_measuring_the_others() -> None:
    x, y = sets(100, 120)
    labels, measured = group_labels(100), Neighbours(y)
    replicates = np.array([measured.values(x[labels != group]) for group in range(20)])
    expected = 20 * measured.values(x) - 19 * replicates
    np.testing.assert_allclose(measured.spread(x, labels).pseudovalues, expected, atol=1e-9)


def test_leaving_a_group_out_of_several_blocks_is_measuring_the_others() -> None:
    x, y = sets(1500, 1200, d=3)
    labels, measured = group_labels(1500), Neighbours(y)
    spread = measured.spread(x, labels)
    replicates = np.array([measured.values(x[labels != group]) for group in (0, 19)])
    expected = 20 * measured.values(x) - 19 * replicates
    np.testing.assert_allclose(spread.pseudovalues[[0, 19]], expected, atol=1e-9)


def test_neighbours_that_are_all_in_one_group_are_looked_for_further_off() -> None:
    """Twenty clusters, each a group of its own: without it, a sample's nearest lie in other clusters."""
    rng = np.random.default_rng(1)
    centres = 100 * rng.normal(size=(20, 3))
    labels = np.repeat(np.arange(20), 30)
    x, y = centres[labels] + 0.01 * rng.normal(size=(600, 3)), 100 * rng.normal(size=(50, 3))
    measured = Neighbours(y)
    replicates = np.array([measured.values(x[labels != group]) for group in range(20)])
    expected = 20 * measured.values(x) - 19 * replicates
    np.testing.assert_allclose(measured.spread(x, labels).pseudovalues, expected, atol=1e-9)


def test_a_set_and_itself_have_all_of_each_other() -> None:
    x, _ = sets(80, 2)
    precision, recall, density, coverage = Neighbours(x).values(x)
    assert (precision, recall, coverage) == (1, 1, 1)
    assert density == pytest.approx(1, abs=0.2)  # itself, and as many others as have it among their nearest


def test_sets_far_apart_have_nothing_of_each_other() -> None:
    x, y = sets(30, 30)
    assert Neighbours(y).values(x + 1000).tolist() == [0, 0, 0, 0]


def test_a_ball_is_open() -> None:
    """Points 0 … 9 on a line: the fifth nearest of each is at a whole distance, where another point lies just outside."""
    line = np.arange(10.0)[:, None]
    from prdc import compute_prdc

    shifted = line + 5
    theirs = compute_prdc(real_features=line, fake_features=shifted, nearest_k=5)
    assert Neighbours(line).values(shifted) == pytest.approx([theirs[name] for name in COLUMNS], abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 50), (4, 3), (50, 2)])
def test_few_or_constant_samples_give_numbers(n: int, m: int) -> None:
    x, y = sets(n, m)
    for first, second in ((x, y), (np.ones((n, 3)), np.ones((m, 3))), (x, np.zeros((m, 6)))):
        found = Neighbours(second).values(first)
        assert np.isfinite(found).all() and (found >= 0).all()
    if n >= 4:
        assert np.isfinite(Neighbours(y).spread(x, group_labels(n)).pseudovalues).all()


def test_the_order_of_samples_does_not_matter() -> None:
    x, y = sets(70, 50)
    rng = np.random.default_rng(2)
    turned = Neighbours(rng.permutation(y)).values(rng.permutation(x))
    assert Neighbours(y).values(x) == pytest.approx(turned, abs=1e-12)


SETS = {
    "in the middle": (1.1, 1.0),
    "precision near 1": (0.7, 0.0),
    "recall near 1": (1.6, 0.0),
    "recall, density and coverage near 0": (0.6, 1.8),
    "precision at 1, recall near 0": (0.25, 0.5),
}
"""A Gaussian's scale and mean in each of six dimensions, against a standard one."""


@pytest.mark.parametrize(("scale", "shift"), SETS.values(), ids=SETS)
def test_intervals_cover(scale: float, shift: float) -> None:
    """Also where a share lies near 0 or 1. The truth is the mean at this number, since recall and coverage depend on it."""
    rng, trials, n = np.random.default_rng(3), 150, 120
    measured = Neighbours(rng.normal(size=(150, 6)))
    rows = [metric for metric in METRICS.values() if metric.statistic is Neighbours]
    spreads = []
    for seed in range(trials):
        labels = group_labels(n, seed)
        spread = measured.spread(scale * rng.normal(size=(n, 6)) + shift, labels)
        spreads.append((spread, np.bincount(labels)))
    truth = np.mean([spread.values for spread, _ in spreads], axis=0)
    for metric in rows:
        low, high = metric.bounds
        found = [
            Jackknife(spread.values[[metric.column]], spread.pseudovalues[:, [metric.column]], left_out).estimate(
                np.ones(1), lowest=low, highest=high, rate=metric.rate
            )
            for spread, left_out in spreads
        ]
        assert all(low <= e.low <= e.value <= e.high <= high and e.low < e.high for e in found)
        assert np.mean([e.low <= truth[metric.column] <= e.high for e in found]) >= 0.92, metric.name


PAIRS = {
    "in the middle": ((1.1, 1.0), (1.1, 0.9)),
    "near 1": ((0.7, 0.0), (0.6, 0.0)),
    "near 0": ((0.6, 1.8), (0.6, 1.7)),
}
"""Scale and mean of two systems' pictures, which are alike prompt by prompt."""


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_intervals_of_paired_differences_cover(first: tuple[float, float], second: tuple[float, float]) -> None:
    """And their p-values agree with them."""
    rng, trials, n = np.random.default_rng(4), 120, 120
    measured = Neighbours(rng.normal(size=(150, 6)))
    found: dict[str, list[Estimate]] = {name: [] for name in COLUMNS}
    for seed in range(trials):
        labels, prompts = group_labels(n, seed), rng.normal(size=(n, 6))
        other = 0.8 * prompts + 0.6 * rng.normal(size=(n, 6))
        both = [
            measured.spread(scale * noise + shift, labels)
            for noise, (scale, shift) in ((prompts, first), (other, second))
        ]
        values = np.stack([spread.values for spread in both], axis=-1)
        pseudovalues = np.stack([spread.pseudovalues for spread in both], axis=-1)
        for column, name in enumerate(COLUMNS):
            cells = Jackknife(values[column], pseudovalues[:, column], np.bincount(labels))
            found[name].append(cells.estimate(np.array([1.0, -1.0]), rate=True))
    for name, estimates in found.items():
        truth = np.mean([estimate.value for estimate in estimates])
        assert np.mean([e.low <= truth <= e.high for e in estimates]) >= 0.92, name
        assert all((e.p_value < 0.05) == (e.low > 0 or e.high < 0) for e in estimates if e.p_value is not None)


def test_equal_pictures_do_not_differ() -> None:
    x, y = sets(120, 150)
    labels = group_labels(120)
    spread = Neighbours(y).spread(x, labels)
    cells = Jackknife(np.repeat(spread.values[0], 2), spread.pseudovalues[:, [0, 0]], np.bincount(labels))
    estimate = cells.estimate(np.array([1.0, -1.0]), rate=True)
    assert (estimate.value, estimate.p_value) == (0.0, 1.0) and estimate.high == pytest.approx(2.093 / 120, rel=1e-3)


def test_the_interval_of_independent_pictures_is_wilson_s() -> None:
    """At many pictures the sample that is added counts for nothing; the closed form is that of statistics' textbooks."""
    n, p, z = 10**6, 0.02, 1.96
    error = np.sqrt(p * (1 - p) / n)
    middle, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert score_interval(p, error, n, z, 1.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("value", "highest"), [(0.0, 1.0), (1.0, 1.0), (0.0, np.inf)])
def test_a_rate_at_its_bound_has_an_interval_to_one_side(value: float, highest: float) -> None:
    """With nothing seen in n pictures, a share of about t² / n is still possible."""
    low, high = score_interval(value, 0.0, 100, 2.0, highest)
    assert (low, high) == pytest.approx({0.0: (0, high), 1.0: (low, 1)}[value], abs=1e-12)
    assert high - low == pytest.approx(4 / 104 if highest == 1 else 4 / 100, rel=1e-9)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DdilError, match="at least two images in either set"):
        Neighbours(np.zeros((1, 3)))
    with pytest.raises(DdilError, match="at least two images in either set"):
        Neighbours(np.zeros((3, 3))).values(np.zeros((1, 3)))
