"""Precision, recall, density and coverage from k nearest neighbours (Kynkäänniemi et al., 2019; Naeem et al., 2020).

The ball of a sample has its k-th nearest neighbour in the same set on its surface. A point is inside a ball where
distance < radius.

- Precision: the share of samples inside a reference ball.
- Density: the mean number of reference balls around a sample, divided by k.
- Recall: the share of reference samples inside a sample's ball.
- Coverage: the share of reference balls with a sample inside.
"""

from __future__ import annotations

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
        self.origin = np.mean(self.reference, axis=0, dtype=np.float64)
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
        groups = int(labels.max()) + 1
        left_out = np.array([-1, *range(groups)]) if groups > 1 else np.array([-1])
        k = max(1, min(self.k, len(features) - 1 - -(-len(features) // GROUPS), len(self.reference) - 1))
        sample_radii = self._radii(features, labels, k)
        if k not in self.radii:
            self.radii[k] = self._radii(self.reference, np.zeros(len(self.reference), dtype=np.int64), k)[0]
        reference_radii = self.radii[k]
        is_inside, num_balls = np.zeros(len(features)), np.zeros(len(features))
        nearest = np.full((groups, len(self.reference)), np.inf)
        recalled = np.zeros((len(left_out), len(self.reference)), dtype=bool)
        for rows in blocks(len(features)):
            x = finite(features[rows]) - self.origin
            for columns in blocks(len(self.reference)):
                distances = _squared(x, finite(self.reference[columns]) - self.origin)
                inside = distances < reference_radii[columns]
                num_balls[rows] += inside.sum(axis=1)
                is_inside[rows] = np.maximum(is_inside[rows], inside.any(axis=1))
                for group in np.unique(labels[rows]):
                    closest = distances[labels[rows] == group].min(axis=0)
                    nearest[group, columns] = np.minimum(nearest[group, columns], closest)
                for i, group in enumerate(left_out):
                    radii = np.where(labels[rows] == group, -1.0, sample_radii[i, rows])
                    recalled[i, columns] |= (distances < radii[:, None]).any(axis=0)
        values = []
        for i, left in enumerate(left_out):
            kept, groups_kept = labels != left, np.arange(groups) != left
            covered = nearest[groups_kept].min(axis=0) < reference_radii
            density = (num_balls / k)[kept].mean()
            values.append([is_inside[kept].mean(), recalled[i].mean(), density, covered.mean()])
        return np.array(values)

    def _radii(self, features: Array, labels: Array, k: int) -> Array:
        """Return squared distances to the k-th nearest other sample: of all samples, and without each group, [1 (+
        groups), n].

        Each sample's few nearest samples are enough for most samples. Where nearly all of them are in one group, the
        radius comes from all distances.
        """
        n, groups = len(features), int(labels.max()) + 1
        few = min(n, 2 * k + 12) if groups > 1 else min(n, k + 1)
        radii = np.empty((groups + 1 if groups > 1 else 1, n))
        for rows in blocks(n, BLOCK // 16):
            distances = np.concatenate(
                [
                    _squared(finite(features[rows]) - self.origin, finite(features[columns]) - self.origin)
                    for columns in blocks(n, 4 * BLOCK)
                ],
                axis=1,
            )
            here = np.arange(rows.start, rows.stop)
            distances[here - rows.start, here] = np.inf
            radii[0, rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
            if groups == 1:
                continue
            order = np.argpartition(distances, few - 1, axis=1)[:, :few]
            close, close_labels = np.take_along_axis(distances, order, axis=1), labels[order]
            for group in range(groups):
                kept = np.where(close_labels == group, np.inf, close)
                radii[group + 1, rows] = np.partition(kept, k - 1, axis=1)[:, k - 1]
                short = np.flatnonzero((close_labels != group).sum(axis=1) <= k)
                if len(short):
                    others = np.where(labels == group, np.inf, distances[short])
                    radii[group + 1, rows.start + short] = np.partition(others, k - 1, axis=1)[:, k - 1]
        return radii


def _squared(x: Array, y: Array) -> Array:
    """Return squared distances between the rows of x and y, [n, m]; at least 0."""
    distances = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
    return np.maximum(distances, 0.0)


def _at_least_two(features: Array | None) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        raise DdilError(
            "nearest neighbours need features [n, d] of at least two images in either set; measure more prompts"
        )
    return features
