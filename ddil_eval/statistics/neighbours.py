"""Precision, recall, density and coverage from k nearest neighbours (Kynkäänniemi et al., 2019; Naeem et al., 2020).

The ball of a sample has its k-th nearest neighbour in the same set on its surface. A point is inside a ball where
distance < radius.

- Precision: the share of samples inside a reference ball.
- Density: the mean number of reference balls around a sample, divided by k.
- Recall: the share of reference samples inside a sample's ball.
- Coverage: the share of reference balls with a sample inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.jackknife import GROUPS, Spread, pseudovalues
from ddil_eval.statistics.moments import BLOCK, blocks, finite

Array = np.ndarray
COLUMNS = ("precision", "recall", "density", "coverage")
NEAREST = 5


class Neighbours:
    """The four values of a set against a reference, in the order of ``COLUMNS``.

    k is 5, or less where a set without one group of the jackknife has too few samples. Distances are computed block by
    block.
    """

    def __init__(self, reference: Array | None, k: int = NEAREST) -> None:
        self.reference = _at_least_two(reference)
        self.k = k
        # Distances do not depend on the origin; rounding errors are smallest near it.
        self.origin = np.asarray(np.mean(self.reference, axis=0, dtype=np.float64))
        self.radii: dict[int, Array] = {}

    def values(self, features: Array) -> Array:
        """Return the four values [4]."""
        return self._replicates(features, np.zeros(len(features), dtype=np.int64))[0]

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return the four values with their pseudovalues."""
        replicates = self._replicates(features, labels)
        return Spread(replicates[0], pseudovalues(replicates[0], replicates[1:], labels))

    def _replicates(self, features: Array, labels: Array) -> Array:
        """Return the values of all samples and, with several groups, without each group: [1 (+ groups), 4]."""
        features = _at_least_two(features)
        n, groups = len(features), int(labels.max()) + 1
        k = max(1, min(self.k, n - 1 - -(-n // GROUPS), len(self.reference) - 1))
        if k not in self.radii:
            one_group = np.zeros(len(self.reference), dtype=np.int64)
            self.radii[k] = _radii(self.reference, self.origin, one_group, k)[0]
        balls = self._balls(features, labels, _radii(features, self.origin, labels, k), self.radii[k])
        values = []
        for i, left in enumerate([-1, *range(groups)] if groups > 1 else [-1]):
            kept, covered = labels != left, balls.covered[np.arange(groups) != left].any(axis=0)
            precision, density = (balls.around[kept] > 0).mean(), (balls.around / k)[kept].mean()
            values.append([precision, balls.recalled[i].mean(), density, covered.mean()])
        return np.array(values)

    def _balls(self, features: Array, labels: Array, radii: Array, reference_radii: Array) -> _Balls:
        """Compare all pairs of a sample and a reference sample with squared ``radii`` [1 (+ groups), n] and [m]."""
        m, groups = len(self.reference), int(labels.max()) + 1
        balls = _Balls(np.zeros(len(features)), np.zeros((groups, m), dtype=bool), np.zeros((len(radii), m), bool))
        left_out = np.arange(len(radii)) - 1
        for rows in blocks(len(features), 4 * BLOCK):
            x, of_rows, widest = centred(features[rows], self.origin), labels[rows], radii[:, rows].max(axis=0)
            by_group = np.argsort(of_rows, kind="stable")
            present, starts = np.unique(of_rows[by_group], return_index=True)
            for columns in blocks(m):
                distances = squared_distances(x, centred(self.reference[columns], self.origin))
                inside = distances < reference_radii[columns]
                balls.around[rows] += inside.sum(axis=1)
                balls.covered[present, columns] |= np.logical_or.reduceat(inside[by_group], starts, axis=0)
                # Few pairs remain: those of a reference sample that is not yet recalled without every group.
                open_columns = columns.start + np.flatnonzero(~balls.recalled[:, columns].all(axis=0))
                if len(open_columns) < len(inside[0]):
                    distances = distances[:, open_columns - columns.start]
                row, column = np.nonzero(distances < widest[:, None])
                near, column = distances[row, column], open_columns[column]
                for i, group in enumerate(left_out):
                    recalled = (near < radii[i, rows][row]) & (of_rows[row] != group)
                    balls.recalled[i, column[recalled]] = True
        return balls


@dataclass(frozen=True)
class _Balls:
    """What lies in whose ball.

    Attributes:
        around: The number of reference balls around each sample, [n].
        covered: Whether a sample of a group is inside the ball of a reference sample, [groups, m].
        recalled: Whether a reference sample is inside the ball of a sample: of all samples, and without each group, [1
            (+ groups), m].
    """

    around: Array
    covered: Array
    recalled: Array


def _radii(features: Array, origin: Array, labels: Array, k: int) -> Array:
    """Return squared distances to the k-th nearest other sample: of all samples, and without each group, [1 (+
    groups), n].

    Each sample's few nearest samples are enough for most samples. Where nearly all of them are in one group, the
    radius comes from the distances to all samples outside the group.
    """
    n, groups = len(features), int(labels.max()) + 1
    few = 2 * k + 12 if groups > 1 else k
    nearest, owners = _nearest(features, origin, labels, few)
    radii = np.empty((groups + 1 if groups > 1 else 1, n))
    radii[0] = nearest[:, k - 1]
    for group in range(len(radii) - 1):
        outside = np.cumsum((owners != group) & np.isfinite(nearest), axis=1)
        place = (outside < k).sum(axis=1)  # of the k-th nearest sample outside the group
        radii[group + 1] = nearest[np.arange(n), np.minimum(place, few - 1)]
        short = np.flatnonzero(place == few)
        for some in np.split(short, range(BLOCK, len(short), BLOCK)):
            radii[group + 1, some] = _radii_among(features, origin, some, np.flatnonzero(labels != group), k)
    return radii


def _radii_among(features: Array, origin: Array, some: Array, others: Array, k: int) -> Array:
    """Return squared distances of ``some`` samples to the k-th nearest of ``others``; both are indices. [some]."""
    rows, closest = centred(features[some], origin), np.empty((len(some), 0))
    for block in blocks(len(others)):
        distances = squared_distances(rows, centred(features[others[block]], origin))
        distances[some[:, None] == others[block]] = np.inf
        closest = np.concatenate([closest, distances], axis=1)
        closest = np.partition(closest, min(k, closest.shape[1]) - 1, axis=1)[:, :k]
    return closest.max(axis=1)


def _nearest(features: Array, origin: Array, labels: Array, few: int) -> tuple[Array, Array]:
    """Return the squared distances to the ``few`` nearest other samples in rising order, and their groups, [n, few].

    Where there are fewer samples, the rows end with infinity. Each pair of blocks is computed once, for both sides.
    """
    n = len(features)
    nearest, owners = np.full((n, few), np.inf), np.full((n, few), -1)

    def add(rows: slice, columns: slice, distances: Array) -> None:
        known = np.concatenate([nearest[rows], distances], axis=1)
        groups = np.concatenate([owners[rows], np.broadcast_to(labels[columns], distances.shape)], axis=1)
        order = np.argpartition(known, few - 1, axis=1)[:, :few]
        nearest[rows], owners[rows] = (np.take_along_axis(values, order, axis=1) for values in (known, groups))

    for rows in blocks(n):
        x = centred(features[rows], origin)
        for columns in blocks(n):
            if columns.start < rows.start:
                continue
            if columns.start == rows.start:
                distances = squared_distances(x, x)
                np.fill_diagonal(distances, np.inf)
                add(rows, columns, distances)
            else:
                distances = squared_distances(x, centred(features[columns], origin))
                add(rows, columns, distances)
                add(columns, rows, distances.T)
    order = np.argsort(nearest, axis=1, kind="stable")
    return np.take_along_axis(nearest, order, axis=1), np.take_along_axis(owners, order, axis=1)


def centred(features: Array, origin: Array) -> Array:
    """Return features [n, d] less ``origin`` [d], in float64. Raises DdilError where they are not finite."""
    return finite(features) - origin


def squared_distances(x: Array, y: Array) -> Array:
    """Return squared distances between the rows of x and y, [n, m]; at least 0."""
    distances = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    products = x @ y.T
    products *= 2
    distances -= products
    return np.maximum(distances, 0.0, out=distances)


def _at_least_two(features: Array | None) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        raise DdilError(
            "nearest neighbours need features [n, d] of at least two images in either set; measure more prompts"
        )
    return features
