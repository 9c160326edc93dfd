"""Precision, recall, density and coverage against the ``prdc`` package and cases with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_core.errors import DdilError
from ddil_eval.statistics import Jackknife, group_labels
from ddil_eval.statistics.neighbours import COLUMNS, Neighbours


def sets(n: int, m: int, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 0.8 * rng.normal(size=(n, d)) + 0.5, rng.normal(size=(m, d))


@pytest.mark.parametrize(("n", "m"), [(60, 90), (300, 200)])
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


def test_intervals_cover() -> None:
    """Precision and density are means over samples given the reference: their truth is that of many samples. Recall and
    coverage depend on how many there are: theirs is the mean at this number."""
    rng = np.random.default_rng(3)
    measured = Neighbours(rng.normal(size=(120, 6)))

    def draw(n: int) -> np.ndarray:
        return 1.1 * rng.normal(size=(n, 6)) + 1.0

    spreads = [(measured.spread(draw(150), group_labels(150, seed)), group_labels(150, seed)) for seed in range(150)]
    at_this_n = np.mean([spread.values for spread, _ in spreads], axis=0)
    truth = np.where([1, 0, 1, 0], measured.values(draw(8000)), at_this_n)
    assert ((truth > 0.2) & (truth < 0.9)).all()  # nearer to 0 or 1 a symmetric interval is too narrow
    hits = []
    for spread, labels in spreads:
        columns = zip(spread.values, spread.pseudovalues.T, strict=True)
        found = [Jackknife(np.array([v]), p[:, None], np.bincount(labels)).cells()[0] for v, p in columns]
        assert all(estimate.low <= estimate.value <= estimate.high for estimate in found)
        hits.append([e.low <= value <= e.high for e, value in zip(found, truth, strict=True)])
    covered = np.mean(hits, axis=0)
    assert covered[[0, 2]] == pytest.approx(0.95, abs=0.06)
    assert (covered[[1, 3]] >= 0.89).all()


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DdilError, match="at least two pictures on either side"):
        Neighbours(np.zeros((1, 3)))
    with pytest.raises(DdilError, match="at least two pictures on either side"):
        Neighbours(np.zeros((3, 3))).values(np.zeros((1, 3)))
