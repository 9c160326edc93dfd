"""Precision, recall, density and coverage from k nearest neighbours (Kynkäänniemi et al., 2019; Naeem et al., 2020).

A sample's ball reaches to its k-th nearest neighbour in its own set. Precision: the share of samples in some reference ball;
density: how many reference balls hold a sample, over k; recall: the share of the reference in some sample's ball; coverage:
the share of reference balls that hold some sample. "In" is strict: distance < radius.
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
    """The four shares of a set against a reference, in the order of ``COLUMNS``.

    k is 5, or less where a set has too few samples for that (a jackknife's group left out). Distances are found block by
    block.
    """

    def __init__(self, reference: Array | None, k: int = NEAREST) -> None:
        self.reference = _at_least_two(reference)
        self.k = k
        # Distances do not change with the origin, and rounding is least near it.
        self.origin = np.mean(self.reference, axis=0, dtype=np.float64)
        self.radii: dict[int, Array] = {}

    def values(self, features: Array) -> Array:
        """The four shares [4]."""
        return self._found(features, np.zeros(len(features), dtype=np.int64))[0]

    def spread(self, features: Array, labels: Array) -> Spread:
        """The four shares with their jackknife."""
        found = self._found(features, labels)
        return Spread(found[0], pseudovalues(found[0], found[1:], labels))

    def _found(self, features: Array, labels: Array) -> Array:
        """The shares of all samples and, where there are several groups, without each of them: [1 (+ groups), 4]."""
        features = _at_least_two(features)
        groups = int(labels.max()) + 1
        left_out = np.array([-1, *range(groups)]) if groups > 1 else np.array([-1])
        k = max(1, min(self.k, len(features) - 1 - -(-len(features) // GROUPS), len(self.reference) - 1))
        own = self._radii(features, labels, k)
        if k not in self.radii:
            self.radii[k] = self._radii(self.reference, np.zeros(len(self.reference), dtype=np.int64), k)[0]
        reach = self.radii[k]
        inside, held = np.zeros(len(features)), np.zeros(len(features))
        nearest = np.full((groups, len(self.reference)), np.inf)
        recalled = np.zeros((len(left_out), len(self.reference)), dtype=bool)
        for rows in blocks(len(features)):
            x = finite(features[rows]) - self.origin
            for columns in blocks(len(self.reference)):
                apart = _squared(x, finite(self.reference[columns]) - self.origin)
                within = apart < reach[columns]
                held[rows] += within.sum(axis=1)
                inside[rows] = np.maximum(inside[rows], within.any(axis=1))
                for group in np.unique(labels[rows]):
                    closest = apart[labels[rows] == group].min(axis=0)
                    nearest[group, columns] = np.minimum(nearest[group, columns], closest)
                for place, group in enumerate(left_out):
                    radii = np.where(labels[rows] == group, -1.0, own[place, rows])
                    recalled[place, columns] |= (apart < radii[:, None]).any(axis=0)
        return np.stack(
            [self._shares(inside, held / k, nearest, recalled[p], reach, labels, g) for p, g in enumerate(left_out)]
        )

    @staticmethod
    def _shares(
        inside: Array, density: Array, nearest: Array, recalled: Array, reach: Array, labels: Array, left_out: int
    ) -> Array:
        kept, groups = labels != left_out, np.arange(len(nearest)) != left_out
        covered = nearest[groups].min(axis=0) < reach
        return np.array([inside[kept].mean(), recalled.mean(), density[kept].mean(), covered.mean()])

    def _radii(self, features: Array, labels: Array, k: int) -> Array:
        """Squared distances to the k-th nearest other sample: of all samples, and without each group, [1 (+ groups), n].

        The nearest few are looked through; the rare sample whose nearest are nearly all in one group is looked up in full.
        """
        n, groups = len(features), int(labels.max()) + 1
        few = min(n, 2 * k + 12) if groups > 1 else min(n, k + 1)
        radii = np.empty((groups + 1 if groups > 1 else 1, n))
        for rows in blocks(n, BLOCK // 16):
            apart = np.concatenate(
                [
                    _squared(finite(features[rows]) - self.origin, finite(features[columns]) - self.origin)
                    for columns in blocks(n, 4 * BLOCK)
                ],
                axis=1,
            )
            here = np.arange(rows.start, rows.stop)
            apart[here - rows.start, here] = np.inf
            radii[0, rows] = np.partition(apart, k - 1, axis=1)[:, k - 1]
            if groups == 1:
                continue
            order = np.argpartition(apart, few - 1, axis=1)[:, :few]
            close, theirs = np.take_along_axis(apart, order, axis=1), labels[order]
            for group in range(groups):
                kept = np.where(theirs == group, np.inf, close)
                radii[group + 1, rows] = np.partition(kept, k - 1, axis=1)[:, k - 1]
                short = np.flatnonzero((theirs != group).sum(axis=1) <= k)
                if len(short):
                    others = np.where(labels == group, np.inf, apart[short])
                    radii[group + 1, rows.start + short] = np.partition(others, k - 1, axis=1)[:, k - 1]
        return radii


def _squared(x: Array, y: Array) -> Array:
    """Squared distances between the rows of x and y, [n, m]; at least 0."""
    found = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
    return np.maximum(found, 0.0)


def _at_least_two(features: Array | None) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        raise DdilError(
            "nearest neighbours need features [n, d] of at least two pictures on either side; ask for more prompts"
        )
    return features
