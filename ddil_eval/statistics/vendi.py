"""The Vendi score (Friedman and Dieng, 2023): the effective number of different images in a set."""

from __future__ import annotations

import numpy as np

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.jackknife import Spread, pseudovalues
from ddil_eval.statistics.moments import blocks, finite

Array = np.ndarray


class Vendi:
    """exp of the entropy of the eigenvalues of K / n, with K the cosines of features: 1 for equal images, at most n.

    The eigenvalues come from Σ u uᵀ / n of the unit vectors u, or from the matrix of cosines where n ≤ d.
    """

    def __init__(self, reference: Array | None = None) -> None:
        pass

    def values(self, features: Array) -> Array:
        """Return the score as one column."""
        return self._replicates(features, np.zeros(len(features), dtype=np.int64))[:1]

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return the score with its pseudovalues."""
        replicates = self._replicates(features, labels)
        return Spread(replicates[:1], pseudovalues(replicates[:1], replicates[1:, None], labels))

    def _replicates(self, features: Array, labels: Array) -> Array:
        """Return the score of all samples and, where there are several groups, without each group: [1 (+ groups)]."""
        if features.ndim != 2 or len(features) == 0:
            raise DdilError("a Vendi score needs features [n, d] of at least one image; measure more prompts")
        n, width = features.shape
        left_out = range(int(labels.max()) + 1) if labels.max() > 0 else range(0)
        if n <= width:
            units = _units(features)
            cosines = units @ units.T
            kept = [np.arange(n), *(np.flatnonzero(labels != group) for group in left_out)]
            return np.array([_score(cosines[np.ix_(rows, rows)]) for rows in kept])
        second_moments = np.zeros((int(labels.max()) + 1, width, width))
        for block in blocks(n):
            units = _units(features[block])
            for group in np.unique(labels[block]):
                of_group = units[labels[block] == group]
                second_moments[group] += of_group.T @ of_group
        total = second_moments.sum(axis=0)
        return np.array([_score(total), *(_score(total - second_moments[group]) for group in left_out)])


def _units(features: Array) -> Array:
    rows = finite(features)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _score(similarity: Array) -> float:
    """Return exp of the entropy of a symmetric matrix's eigenvalues, as shares of their sum; 1 where all are 0."""
    shares = np.maximum(np.linalg.eigvalsh(similarity), 0.0)
    shares = shares[shares > 0] / max(shares.sum(), np.finfo(np.float64).tiny)
    return float(np.exp(-(shares * np.log(shares)).sum()))
