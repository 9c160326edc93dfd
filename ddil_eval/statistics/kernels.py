"""Squared maximum mean discrepancies: the kernel distance (KID) and CLIP's (CMMD).

MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y). One pass over all pairs, block by block, so that the features may
lie on disk, adds up what the value and its jackknife need: the sums of the kernel by group, and those by KID's random
subsets.

The products x · y of float32 features are float32, at half the cost of float64. Everything else is float64. The
rounding of the products averages out: on features like Inception's KID changes by less than 1e-8. The change grows with
their mean: it is below 1 % of KID's standard error where the mean is 10 times the spread, and below 25 % at 100 times
(``tests/eval/statistics/test_kernels.py``).
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


_CACHED = 64
"""Rows of a kernel at once. So what is made of their products stays in the cache of the processor."""


def polynomial(x: Array, y: Array) -> Array:
    """Return (x·y / d + 1)³ for the rows of x [n, d] and y [m, d]: KID's kernel (Bińkowski et al., 2018), float64."""
    products = x @ y.T
    cubes = np.empty(products.shape)
    for start in range(0, len(products), _CACHED):
        base = products[start : start + _CACHED].astype(np.float64)
        base /= x.shape[1]
        base += 1.0
        cube = np.multiply(base, base, out=cubes[start : start + _CACHED])
        cube *= base  # a power takes ten times as long
    return cubes


def gaussian(x: Array, y: Array, sigma: float = 10.0) -> Array:
    """Return exp(−‖x − y‖² / 2σ²) for the rows of x [n, d] and y [m, d], in float64: CMMD's kernel."""
    squared = (x @ y.T).astype(np.float64, copy=False)
    squared *= -2.0
    squared += np.square(x, dtype=np.float64).sum(axis=1)[:, None]
    squared += np.square(y, dtype=np.float64).sum(axis=1)
    np.maximum(squared, 0.0, out=squared)
    squared /= -2 * sigma**2
    return np.exp(squared, out=squared)


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


def _within(features: Array, members: Array, kernel: Kernel) -> tuple[Array, Array]:
    """Return sums of the kernel over pairs of samples of two sets, [sets, sets], and of a sample with itself, [sets].

    ``members`` [n, sets] says which samples belong to each set.
    """
    sums, diagonal = np.zeros((members.shape[1],) * 2), np.zeros(members.shape[1])
    for block in blocks(len(features)):
        rows, in_rows = _rows(features[block]), members[block].astype(np.float64)
        for other in blocks(len(features)):
            if other.start < block.start:
                continue  # k is symmetric: compute each pair of blocks once
            if other.start == block.start:
                values = kernel(rows, rows)
                diagonal += np.diagonal(values) @ in_rows
                sums += in_rows.T @ (values @ in_rows)
            else:
                pairs = in_rows.T @ (kernel(rows, _rows(features[other])) @ members[other].astype(np.float64))
                sums += pairs + pairs.T
    return sums, diagonal


def _across(x: Array, members: Array, y: Array, reference_members: Array, kernel: Kernel) -> Array:
    """Return sums of the kernel over pairs of a sample of a set and a reference sample of a set, [sets, sets]."""
    sums = np.zeros((members.shape[1], reference_members.shape[1]))
    for block in blocks(len(x)):
        rows, in_rows = _rows(x[block]), members[block].astype(np.float64)
        for other in blocks(len(y)):
            sums += in_rows.T @ (kernel(rows, _rows(y[other])) @ reference_members[other].astype(np.float64))
    return sums


def _sums(features: Array, reference: Array, labels: Array, kernel: Kernel) -> _Sums:
    groups = _groups(labels)
    within, diagonal = _within(features, groups, kernel)
    return _Sums(within, diagonal, _across(features, groups, reference, _everyone(reference), kernel)[:, 0])


def _groups(labels: Array) -> Array:
    """Return which samples belong to each group, bool [n, groups]."""
    return np.eye(int(labels.max()) + 1, dtype=bool)[labels]


def _everyone(features: Array) -> Array:
    """Return one set that holds every sample, bool [n, 1]."""
    return np.ones((len(features), 1), dtype=bool)


def _rows(features: Array) -> Array:
    """Return features as float32 where they are float32 or float16, else as float64. Refuse values not finite."""
    return finite(features, np.float32 if features.dtype in (np.float16, np.float32) else np.float64)


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
        self._reference_sums: dict[int, Array] = {}

    def values(self, features: Array) -> Array:
        """Return KID as one column."""
        chosen, of_reference = self._chosen(_at_least_two(features, "KID"))
        fewer = min(len(features), len(self.reference))
        if fewer**2 > np.square(chosen.sum(axis=0)).sum():  # the subsets have fewer pairs than all samples together
            within, across = self._subset_by_subset(features, chosen, of_reference)
        else:
            within = _sums_within(features, chosen)
            across = _sums_across(features, chosen, self.reference, of_reference)
        return np.array([self._draws(within, across, chosen, of_reference).mean()])

    def _subset_by_subset(self, features: Array, chosen: Array, of_reference: Array) -> tuple[Array, Array]:
        """Return KID's sums within the subsets and across, each [subsets]. Each subset is read once."""
        within, across, reference = list[float](), list[float](), list[float]()
        known = len(features) in self._reference_sums
        for a, b in zip(chosen.T, of_reference.T, strict=True):
            x, y = _rows(features[np.flatnonzero(a)]), _rows(self.reference[np.flatnonzero(b)])
            within.append(_different_pairs(x))
            across.append(polynomial(x, y).sum())
            if not known:
                reference.append(_different_pairs(y))
        if not known:
            self._reference_sums[len(features)] = np.array(reference)
        return np.array(within), np.array(across)

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return KID with its pseudovalues and draws, from one pass over all pairs."""
        chosen, of_reference = self._chosen(_at_least_two(features, "KID"))
        groups = _groups(labels)
        count, members = groups.shape[1], np.concatenate([groups, chosen], axis=1)
        within, diagonal = _within(features, members, polynomial)
        reference_members = np.concatenate([_everyone(self.reference), of_reference], axis=1)
        across = _across(features, members, self.reference, reference_members, polynomial)
        sums = _Sums(within[:count, :count], diagonal[:count], across[:count, 0])
        exact = _discrepancies(sums, np.bincount(labels), len(self.reference), unbiased=True)
        pseudo = pseudovalues(exact[:1], exact[1:, None], labels)
        drawn_within = np.diagonal(within)[count:] - diagonal[count:]
        draws = self._draws(drawn_within, np.diagonal(across[count:, 1:]), chosen, of_reference)
        value = draws.mean()
        return Spread(np.array([value]), pseudo - exact[0] + value, draws[:, None])

    def _chosen(self, features: Array) -> tuple[Array, Array]:
        """Return which samples, and which reference samples, each subset holds: bool [n, subsets], [m, subsets].

        There is one subset where it holds all samples of both sides.
        """
        n, m = len(features), len(self.reference)
        size = min(self.size, n, m)
        count = 1 if n == m == size else self.subsets
        chosen, of_reference = np.zeros((n, count), dtype=bool), np.zeros((m, count), dtype=bool)
        rng = np.random.default_rng([self.seed, n, m])
        for subset in range(count):
            chosen[rng.choice(n, size, replace=False), subset] = True
            of_reference[rng.choice(m, size, replace=False), subset] = True
        return chosen, of_reference

    def _draws(self, within: Array, across: Array, chosen: Array, of_reference: Array) -> Array:
        """Return the MMD² of each pair of subsets, [subsets], from sums of the kernel over their pairs."""
        n, size = len(chosen), int(chosen[:, 0].sum())
        if n not in self._reference_sums:
            self._reference_sums[n] = _sums_within(self.reference, of_reference)
        return (within + self._reference_sums[n]) / (size * (size - 1)) - 2 * across / size**2


def _sums_within(features: Array, chosen: Array) -> Array:
    """Return KID's sums over pairs of different samples of each subset: by one pass or by subsets, what is less work.

    ``chosen`` [n, subsets] says which samples each subset holds.
    """
    if len(features) ** 2 <= np.square(chosen.sum(axis=0)).sum():
        within, diagonal = _within(features, chosen, polynomial)
        return np.asarray(np.diagonal(within) - diagonal)
    return np.array([_different_pairs(_rows(features[np.flatnonzero(subset)])) for subset in chosen.T])


def _different_pairs(rows: Array) -> float:
    """Return the sum of KID's kernel over pairs of different rows."""
    values = polynomial(rows, rows)
    return float(values.sum() - np.trace(values))


def _sums_across(x: Array, chosen: Array, y: Array, of_reference: Array) -> Array:
    """Return KID's sums over pairs of a sample and a reference sample of each subset, by whichever is less work."""
    if len(x) * len(y) <= (chosen.sum(axis=0) * of_reference.sum(axis=0)).sum():
        return np.asarray(np.diagonal(_across(x, chosen, y, of_reference, polynomial)))
    pairs = zip(chosen.T, of_reference.T, strict=True)
    return np.array([polynomial(_rows(x[np.flatnonzero(a)]), _rows(y[np.flatnonzero(b)])).sum() for a, b in pairs])


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
