"""Squared maximum mean discrepancies: the kernel distance (KID) and CLIP's (CMMD).

MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y). The jackknife needs the sums of the kernel by group. They are
added up block by block, so that the features may lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.jackknife import Spread, pseudovalues
from ddil_eval.statistics.moments import blocks, finite

Array = np.ndarray
Kernel = Callable[[Array, Array], Array]


def polynomial(x: Array, y: Array) -> Array:
    """Return (x·y / d + 1)³ for the rows of x [n, d] and y [m, d]: KID's kernel (Bińkowski et al., 2018)."""
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # a power takes ten times as long


def gaussian(x: Array, y: Array, sigma: float = 10.0) -> Array:
    """Return exp(−‖x − y‖² / 2σ²) for the rows of x [n, d] and y [m, d]: CMMD's kernel."""
    squared = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
    return np.exp(-np.maximum(squared, 0.0) / (2 * sigma**2))


@dataclass(frozen=True)
class _Sums:
    """Sums of a kernel by group.

    Attributes:
        within: Sums [groups, groups] over all pairs of samples.
        diagonal: Sums [groups] over pairs of a sample with itself.
        across: Sums [groups] over pairs of a sample and a reference sample.
    """

    within: Array
    diagonal: Array
    across: Array


def _sums(features: Array, reference: Array, labels: Array, kernel: Kernel) -> _Sums:
    member = np.eye(int(labels.max()) + 1)
    within, across, diagonal = np.zeros_like(member), np.zeros(len(member)), np.zeros(len(member))
    for block in blocks(len(features)):
        rows, in_group = finite(features[block]), member[labels[block]]
        diagonal += in_group.T @ np.diag(kernel(rows, rows))
        for other in blocks(len(features)):
            if other.start < block.start:
                continue  # k is symmetric: compute each pair of blocks once
            pairs = in_group.T @ (kernel(rows, finite(features[other])) @ member[labels[other]])
            within += pairs if other.start == block.start else pairs + pairs.T
        for other in blocks(len(reference)):
            across += in_group.T @ kernel(rows, finite(reference[other])).sum(axis=1)
    return _Sums(within, diagonal, across)


def _discrepancies(sums: _Sums, sizes: Array, m: int, *, unbiased: bool) -> Array:
    """Return MMD² minus the term of the reference alone: for all samples, and without each group, [1 + groups]."""
    ones = np.ones(len(sizes))
    kept = np.concatenate([ones[None], ones - np.eye(len(sizes))])
    n = kept @ sizes
    within = np.einsum("ki,ij,kj->k", kept, sums.within, kept) - (kept @ sums.diagonal if unbiased else 0.0)
    return within / (n * (n - 1) if unbiased else n**2) - 2 * (kept @ sums.across) / (n * m)


class KernelDistance:
    """KID: the unbiased MMD² of the polynomial kernel, a mean over 100 pairs of random subsets of 1,000 samples.

    With fewer than 1,000 samples on one side the subsets are smaller. The random generator depends only on (seed, n,
    m), so cells with equally many images share the subsets. KID is unbiased, so it may fall a little below 0.

    The interval is the jackknife of the unbiased MMD² of all samples, widened by the spread over the random subsets.
    """

    subsets, size = 100, 1000

    def __init__(self, reference: Array | None, seed: int = 0) -> None:
        self.reference = _at_least_two(reference, "KID")
        self.seed = seed

    def values(self, features: Array) -> Array:
        """Return KID as one column."""
        return np.array([self._draws(features).mean()])

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return KID with its pseudovalues and draws."""
        draws = self._draws(features)
        sums = _sums(features, self.reference, labels, polynomial)
        exact = _discrepancies(sums, np.bincount(labels), len(self.reference), unbiased=True)
        pseudo = pseudovalues(exact[:1], exact[1:, None], labels)
        value = draws.mean()
        return Spread(np.array([value]), pseudo - exact[0] + value, draws[:, None])

    def _draws(self, features: Array) -> Array:
        """Return the MMD² of each pair of subsets, [subsets]; [1] where the subsets hold all samples."""
        features = _at_least_two(features, "KID")
        n, m = len(features), len(self.reference)
        size = min(self.size, n, m)
        rng = np.random.default_rng([self.seed, n, m])
        count = 1 if n == m == size else self.subsets
        return np.array(
            [self._discrepancy(_subset(features, size, rng), _subset(self.reference, size, rng)) for _ in range(count)]
        )

    @staticmethod
    def _discrepancy(x: Array, y: Array) -> float:
        size = len(x)
        within = sum(float(k.sum() - np.trace(k)) for k in (polynomial(x, x), polynomial(y, y)))
        return within / (size * (size - 1)) - 2 * float(polynomial(x, y).mean())


def _subset(features: Array, size: int, rng: np.random.Generator) -> Array:
    return finite(features[np.sort(rng.choice(len(features), size, replace=False))])


class GaussianDiscrepancy:
    """CMMD: 1,000 × the MMD² of the Gaussian kernel with σ = 10, over all pairs, also of a sample with itself.

    This is the published form; it is at least 0. The features must be unit vectors, as CLIP's are.
    """

    scale = 1000.0

    def __init__(self, reference: Array | None) -> None:
        self.reference = _at_least_two(reference, "CMMD")
        one_group = np.zeros(len(self.reference), dtype=np.int64)
        sums = _sums(self.reference, self.reference[:0], one_group, gaussian)
        self.reference_term = float(sums.within.item()) / len(self.reference) ** 2

    def values(self, features: Array) -> Array:
        """Return CMMD as one column."""
        return self._replicates(features, np.zeros(len(features), dtype=np.int64))[:1]

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return CMMD with its pseudovalues."""
        replicates = self._replicates(features, labels)
        return Spread(replicates[:1], pseudovalues(replicates[:1], replicates[1:, None], labels))

    def _replicates(self, features: Array, labels: Array) -> Array:
        """Return CMMD of all samples and, where there are several groups, without each group: [1 (+ groups)]."""
        sums = _sums(_at_least_two(features, "CMMD"), self.reference, labels, gaussian)
        sizes = np.bincount(labels)
        if len(sizes) == 1:
            total = sums.within.item() / sizes[0] ** 2 - 2 * sums.across[0] / (sizes[0] * len(self.reference))
            return np.array([self.scale * max(0.0, total + self.reference_term)])
        discrepancies = _discrepancies(sums, sizes, len(self.reference), unbiased=False)
        return self.scale * np.maximum(discrepancies + self.reference_term, 0.0)


def _at_least_two(features: Array | None, name: str) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        raise DdilError(f"{name} needs features [n, d] of at least two images in either set; measure more prompts")
    return features
