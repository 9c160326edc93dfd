"""Squared maximum mean discrepancies: the kernel distance (KID), and CLIP's (CMMD).

MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y). What a jackknife needs are the kernel's sums by group, found block by
block, so that features may lie on disk.
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
    """(x·y / d + 1)³ between the rows of x [n, d] and y [m, d]: KID's kernel (Bińkowski et al., 2018)."""
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # a power is ten times as slow


def gaussian(x: Array, y: Array, sigma: float = 10.0) -> Array:
    """exp(−‖x − y‖² / 2σ²) between the rows of x [n, d] and y [m, d]: CMMD's kernel, σ = 10 (Jayasumana et al., 2024)."""
    squared = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
    return np.exp(-np.maximum(squared, 0.0) / (2 * sigma**2))


@dataclass(frozen=True)
class _Sums:
    """Sums of a kernel by group: ``within`` [groups, groups] over pairs of the set, ``diagonal`` [groups], ``across`` [groups]."""

    within: Array
    diagonal: Array
    across: Array


def _sums(features: Array, reference: Array, labels: Array, kernel: Kernel) -> _Sums:
    member = np.eye(int(labels.max()) + 1)
    within, across, diagonal = np.zeros_like(member), np.zeros(len(member)), np.zeros(len(member))
    for block in blocks(len(features)):
        rows, own = finite(features[block]), member[labels[block]]
        diagonal += own.T @ np.diag(kernel(rows, rows))
        for other in blocks(len(features)):
            if other.start < block.start:
                continue  # k(x, y) = k(y, x): each pair of blocks once
            pairs = own.T @ (kernel(rows, finite(features[other])) @ member[labels[other]])
            within += pairs if other.start == block.start else pairs + pairs.T
        for other in blocks(len(reference)):
            across += own.T @ kernel(rows, finite(reference[other])).sum(axis=1)
    return _Sums(within, diagonal, across)


def _discrepancies(sums: _Sums, sizes: Array, m: int, *, unbiased: bool) -> Array:
    """MMD² less the reference's own part: of all groups, and then without each of them, [1 + groups]."""
    everything = np.ones(len(sizes))
    kept = np.concatenate([everything[None], everything - np.eye(len(sizes))])
    n = kept @ sizes
    within = np.einsum("ki,ij,kj->k", kept, sums.within, kept) - (kept @ sums.diagonal if unbiased else 0.0)
    return within / (n * (n - 1) if unbiased else n**2) - 2 * (kept @ sums.across) / (n * m)


class KernelDistance:
    """KID: the unbiased MMD² of the polynomial kernel, a mean over 100 pairs of random subsets of 1,000.

    Subsets are smaller where there are fewer samples than 1,000 on either side. They are drawn by a generator that depends
    on (seed, n, m) alone, so that cells of as many pictures share them. Unbiased, it may fall a little below 0.

    The interval is that of the same quantity from all pairs of samples, jackknifed, with the spread that the draws of
    subsets add.
    """

    subsets, size = 100, 1000

    def __init__(self, reference: Array | None, seed: int = 0) -> None:
        self.reference = _at_least_two(reference, "KID")
        self.seed = seed

    def values(self, features: Array) -> Array:
        """KID as a statistic of one column."""
        return np.array([self._draws(features).mean()])

    def spread(self, features: Array, labels: Array) -> Spread:
        """KID with its jackknife and its draws."""
        draws = self._draws(features)
        sums = _sums(features, self.reference, labels, polynomial)
        found = _discrepancies(sums, np.bincount(labels), len(self.reference), unbiased=True)
        own = pseudovalues(found[:1], found[1:, None], labels)
        value = draws.mean()
        return Spread(np.array([value]), own - found[0] + value, draws[:, None])

    def _draws(self, features: Array) -> Array:
        """MMD² of each pair of subsets, [subsets]; one where the subsets are the sets themselves."""
        features = _at_least_two(features, "KID")
        n, m = len(features), len(self.reference)
        size = min(self.size, n, m)
        rng = np.random.default_rng([self.seed, n, m])
        count = 1 if n == m == size else self.subsets
        return np.array(
            [self._subset(_some(features, size, rng), _some(self.reference, size, rng)) for _ in range(count)]
        )

    @staticmethod
    def _subset(x: Array, y: Array) -> float:
        size = len(x)
        own = sum(float(k.sum() - np.trace(k)) for k in (polynomial(x, x), polynomial(y, y)))
        return own / (size * (size - 1)) - 2 * float(polynomial(x, y).mean())


def _some(features: Array, size: int, rng: np.random.Generator) -> Array:
    return finite(features[np.sort(rng.choice(len(features), size, replace=False))])


class GaussianDiscrepancy:
    """CMMD: 1,000 × the MMD² of the Gaussian kernel with σ = 10, over all pairs, each sample's with itself included.

    That is the published form; it is at least 0. Features are taken as unit vectors, as CLIP's.
    """

    scale = 1000.0

    def __init__(self, reference: Array | None) -> None:
        self.reference = _at_least_two(reference, "CMMD")
        one = np.zeros(len(self.reference), dtype=np.int64)
        self.own = (
            float(_sums(self.reference, self.reference[:0], one, gaussian).within.item()) / len(self.reference) ** 2
        )

    def values(self, features: Array) -> Array:
        """CMMD as a statistic of one column."""
        return self._found(features, np.zeros(len(features), dtype=np.int64))[:1]

    def spread(self, features: Array, labels: Array) -> Spread:
        """CMMD with its jackknife."""
        found = self._found(features, labels)
        return Spread(found[:1], pseudovalues(found[:1], found[1:, None], labels))

    def _found(self, features: Array, labels: Array) -> Array:
        sums = _sums(_at_least_two(features, "CMMD"), self.reference, labels, gaussian)
        sizes = np.bincount(labels)
        if len(sizes) == 1:
            total = sums.within.item() / sizes[0] ** 2 - 2 * sums.across[0] / (sizes[0] * len(self.reference))
            return np.array([self.scale * max(0.0, total + self.own)])
        found = _discrepancies(sums, sizes, len(self.reference), unbiased=False)
        return self.scale * np.maximum(found + self.own, 0.0)


def _at_least_two(features: Array | None, name: str) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        raise DdilError(f"{name} needs features [n, d] of at least two pictures on either side; ask for more prompts")
    return features
