"""The distances of points against brute force, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import energy_distance as energy_1d

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.points import EnergyDistance, SlicedWasserstein, energy_distance, sliced_wasserstein

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(60, 3)), RANDOM.normal(0.5, 1.5, size=(45, 3))
LABELS = np.arange(60) % 7


def test_the_energy_distance_is_its_definition() -> None:
    assert energy_distance(X, Y) == pytest.approx(2 * cdist(X, Y).mean() - pdist(X).mean() - pdist(Y).mean(), rel=1e-12)


def test_the_energy_distance_in_one_dimension_is_scipys() -> None:
    """scipy's is the root of half of the biased distance, which counts pairs of a point with itself."""
    x, y = X[:, :1], Y[:, :1]
    biased = energy_distance(x, y) + pdist(x).mean() / len(x) + pdist(y).mean() / len(y)
    assert biased == pytest.approx(2 * (energy_1d(x[:, 0], y[:, 0]) ** 2) / 2, rel=1e-9)


def test_the_energy_distance_has_no_bias() -> None:
    found = [energy_distance(*RANDOM.normal(size=(2, 20, 2))) for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20


def test_the_sliced_distance_of_a_translation() -> None:
    """W₂ along a direction is the length of the translation along it; their mean square over directions is ‖u‖²/D."""
    shift = np.array([3.0, 0.0, -4.0])
    assert sliced_wasserstein(X, X + shift, directions=4000) == pytest.approx(5 / np.sqrt(3), rel=0.02)
    assert sliced_wasserstein(X, X[::-1]) == 0


def test_the_sliced_distance_of_sets_of_two_sizes() -> None:
    """Each point twice is the same distribution."""
    assert sliced_wasserstein(X, np.repeat(Y, 2, axis=0)) == pytest.approx(sliced_wasserstein(X, Y), rel=1e-12)


@pytest.mark.parametrize("kind", [EnergyDistance, SlicedWasserstein])
def test_the_jackknife_leaves_groups_out(kind: type[EnergyDistance] | type[SlicedWasserstein]) -> None:
    statistic = kind(Y)
    spread = statistic.spread(X, LABELS)
    share = len(X) / np.bincount(LABELS)
    whole = statistic.values(X)[0]
    expected = [h * whole - (h - 1) * kind(Y).values(X[g != LABELS])[0] for g, h in enumerate(share)]
    assert spread.values[0] == pytest.approx(whole)
    assert spread.pseudovalues[:, 0] == pytest.approx(expected, rel=1e-9)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(DdilError, match=r"needs points \[n, D\], at least 2 in each set"):
        energy_distance(X[:1], Y)
