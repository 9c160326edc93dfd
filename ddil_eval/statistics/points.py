"""Distances between two sets of points in a few dimensions: the energy distance, and the sliced Wasserstein distance.

All is float64. Each is a function of two sets, and a ``Statistic`` with the delete-a-group jackknife.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.jackknife import Spread, pseudovalues
from ddil_eval.statistics.moments import blocks, finite

Array = np.ndarray
DIRECTIONS = 128
"""The directions of the sliced distance."""


def energy_distance(x: Array, y: Array) -> float:
    """Return the energy distance 2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ (Székely and Rizzo, 2013), without bias.

    It is 0 for two sets of one distribution on average, and so it may fall below 0.

    Args:
        x: Points [n, D], n ≥ 2.
        y: Points [m, D], m ≥ 2.

    Raises:
        DdilError: a set is too small, or a point is not finite.
    """
    return float(EnergyDistance(y).values(x)[0])


def sliced_wasserstein(x: Array, y: Array, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """Return the sliced Wasserstein distance √(mean over directions of W₂²) (Bonneel et al., 2015).

    W₂ in one dimension is the distance of the two sets' quantile functions. Two finite sets of one distribution have a
    distance above 0, which falls with their sizes.

    Args:
        x: Points [n, D].
        y: Points [m, D].
        directions: The number of random directions.
        seed: The seed of the directions.

    Raises:
        DdilError: a set is empty, or a point is not finite.
    """
    return float(SlicedWasserstein(y, directions, seed).values(x)[0])


class EnergyDistance:
    """The energy distance to a reference [m, D]."""

    def __init__(self, reference: Array | None) -> None:
        self.reference = _points(reference, 2)
        m = len(self.reference)
        self.within = float(_sums(self.reference, self.reference).sum()) / (m * (m - 1))

    def values(self, features: Array) -> Array:
        """Return the distance of points [n, D] as one column."""
        return self._distances(features, np.zeros(len(features), dtype=np.int64))[:1]

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return the distance with its pseudovalues."""
        found = self._distances(features, labels)
        return Spread(found[:1], pseudovalues(found[:1], found[1:, None], labels))

    def _distances(self, features: Array, labels: Array) -> Array:
        """Return the distance of all points and, where there are several groups, without each group."""
        x = _points(features, 2)
        groups = np.eye(int(labels.max()) + 1)[labels]
        across = groups.T @ _sums(x, self.reference)
        within = np.stack([_sums(x, x, members) for members in groups.T], axis=1)
        pairs, sizes = groups.T @ within, groups.sum(axis=0)
        everyone = self._distance(across.sum(), pairs.sum(), len(x))
        if len(sizes) == 1:
            return np.array([everyone])
        left = pairs.sum() - 2 * pairs.sum(axis=1) + np.diag(pairs)
        return np.array([everyone, *self._distance(across.sum() - across, left, len(x) - sizes)])

    def _distance(self, across: Any, within: Any, count: Any) -> Any:
        """Return the distance of ``count`` points from the sums of ‖x − y‖ and of ‖x − x'‖."""
        return 2 * across / (count * len(self.reference)) - within / (count * (count - 1)) - self.within


def _sums(x: Array, y: Array, weights: Array | None = None) -> Array:
    """Return Σ_j w_j ‖x_i − y_j‖ for each point of x, [n]. Without ``weights`` each is 1."""
    sums = np.zeros(len(x))
    for block in blocks(len(x)):
        distances = cdist(x[block], y)
        sums[block] = distances.sum(axis=1) if weights is None else distances @ weights
    return sums


class SlicedWasserstein:
    """The sliced Wasserstein distance to a reference [m, D]."""

    def __init__(self, reference: Array | None, directions: int = DIRECTIONS, seed: int = 0) -> None:
        points = _points(reference, 1)
        drawn = np.random.default_rng([seed, directions]).normal(size=(directions, points.shape[1]))
        self.directions = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        self.sorted = np.sort(self.directions @ points.T, axis=1)

    def values(self, features: Array) -> Array:
        """Return the distance of points [n, D] as one column."""
        projected = np.sort(self.directions @ _points(features, 1).T, axis=1)
        return np.array([self._distance(projected)])

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return the distance with its pseudovalues."""
        projected = self.directions @ _points(features, 1).T
        order = np.argsort(projected, axis=1)
        projected = np.take_along_axis(projected, order, axis=1)
        groups = labels[order]  # each group has the same number of points in every direction
        without = [
            self._distance(projected[groups != group].reshape(len(projected), -1))
            for group in range(int(labels.max()) + 1)
        ]
        value = np.array([self._distance(projected)])
        return Spread(value, pseudovalues(value, np.array(without)[:, None], labels))

    def _distance(self, projected: Array) -> float:
        """Compare the quantile functions of sorted projections [directions, n] with the reference's.

        Both are steps. Between two edges of either, neither changes.
        """
        pair = (projected, self.sorted)
        edges = np.union1d(*(np.arange(values.shape[1] + 1) / values.shape[1] for values in pair))
        middles = (edges[1:] + edges[:-1]) / 2
        ours, theirs = (values[:, (middles * values.shape[1]).astype(np.int64)] for values in pair)
        return float(np.sqrt((np.square(ours - theirs) @ np.diff(edges)).mean()))


def _points(points: Array | None, fewest: int) -> Array:
    if points is None or points.ndim != 2 or len(points) < fewest:
        raise DdilError(f"a distance between sets needs points [n, D], at least {fewest} in each set; measure more")
    return finite(points)
