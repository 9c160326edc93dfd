"""Mean and scatter of features as they come, in float64, in memory that does not grow with their number.

Up to d samples their rows are kept, which need no more room than a covariance and lose nothing: a Fréchet distance of few
samples is found from them. Beyond, what is kept is the mean and the scatter Σ (x − μ)(x − μ)ᵀ. Parts merge by the
identity of Chan, Golub and LeVeque (1979), so shards give the numbers of one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ddil_core.support.errors import DdilError

Array = np.ndarray
BLOCK = 1024
"""Rows that are read at a time from features that may lie on disk."""


@dataclass(frozen=True)
class Moments:
    """``count`` samples with their ``mean`` [d], and their ``scatter`` [d, d] or, where count ≤ d, their ``rows`` [count, d]."""

    count: int
    mean: Array
    scatter: Array | None = field(default=None, repr=False)
    rows: Array | None = field(default=None, repr=False)

    @staticmethod
    def of(features: Array) -> Moments:
        """The moments of features [n, d], n ≥ 1, read block by block. Raises DdilError where they are not finite."""
        if features.ndim != 2 or len(features) == 0:
            raise DdilError(f"moments need features [n, d] of at least one picture, not {list(features.shape)}")
        gathered = _Gathering(features.shape[1])
        for block in blocks(len(features)):
            gathered.add(finite(features[block]))
        return gathered.moments()

    @staticmethod
    def merged(parts: Iterable[Moments]) -> Moments:
        """The moments of all parts' samples together, in the parts' order."""
        parts = [part for part in parts if part.count]
        count, width = sum(part.count for part in parts), len(parts[0].mean)
        rows = [part.rows for part in parts if part.rows is not None]
        if len(rows) == len(parts) and count <= width:
            together = np.concatenate(rows)
            return Moments(count, together.mean(axis=0), rows=together)
        mean = np.asarray(sum(part.count * part.mean for part in parts) / count)
        apart = np.stack([np.sqrt(part.count) * (part.mean - mean) for part in parts])
        scatter = apart.T @ apart
        for part in parts:
            scatter += part.own_scatter()
        return Moments(count, mean, scatter=scatter)

    def less(self, part: Moments) -> Moments:
        """The moments without those of a part of the samples; more than d must be left."""
        count = self.count - part.count
        mean = (self.count * self.mean - part.count * part.mean) / count
        apart = np.sqrt(self.count * part.count / count) * (part.mean - self.mean)
        return Moments(count, mean, scatter=self.own_scatter() - part.own_scatter() - np.outer(apart, apart))

    def own_scatter(self) -> Array:
        """Σ (x − μ)(x − μ)ᵀ [d, d]."""
        if self.scatter is not None:
            return self.scatter
        assert self.rows is not None
        centred = self.rows - self.mean
        return centred.T @ centred

    def factor(self) -> Array:
        """L [d, min(count, d)] with L Lᵀ = the unbiased covariance; count ≥ 2."""
        if self.rows is not None:
            return (self.rows - self.mean).T / np.sqrt(self.count - 1)
        covariance = self.own_scatter() / (self.count - 1)
        try:
            return np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:  # not of full rank
            values, vectors = np.linalg.eigh(covariance)
            return vectors * np.sqrt(np.maximum(values, 0.0))

    def trace(self) -> float:
        """The trace of the unbiased covariance; count ≥ 2."""
        if self.rows is not None:
            return float(np.square(self.rows - self.mean).sum() / (self.count - 1))
        return float(np.trace(self.own_scatter()) / (self.count - 1))


class _Gathering:
    """Rows on their way into moments: kept as they are up to d of them, then folded in a block at a time."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.folded: Moments | None = None
        self.waiting: list[Array] = []
        self.count = 0

    def add(self, rows: Array) -> None:
        self.waiting.append(rows)
        self.count += len(rows)
        if self.count > (self.width if self.folded is None else BLOCK):
            self.folded, self.waiting, self.count = self.moments(), [], 0

    def moments(self) -> Moments:
        parts = [] if self.folded is None else [self.folded]
        if self.count:
            rows = np.concatenate(self.waiting)
            mean = rows.mean(axis=0)
            if len(rows) <= self.width:
                parts.append(Moments(len(rows), mean, rows=rows))
            else:
                centred = rows - mean  # one array: NumPy then takes the symmetric product, at half the work
                parts.append(Moments(len(rows), mean, scatter=centred.T @ centred))
        if not parts:
            return Moments(0, np.zeros(self.width))
        return parts[0] if len(parts) == 1 else Moments.merged(parts)


class GroupMoments:
    """The moments of each group of a jackknife, from batches in any order: all that a Fréchet distance's interval needs.

    The room is groups · d² numbers at most, whatever the number of pictures. Shards that were gathered apart, each with the
    labels of its own samples, merge.
    """

    def __init__(self, groups: int, width: int) -> None:
        self._gathering = [_Gathering(width) for _ in range(groups)]

    @staticmethod
    def of(features: Array, labels: Array) -> GroupMoments:
        """The moments of features [n, d] by their labels [n], read block by block."""
        found = GroupMoments(int(labels.max()) + 1, features.shape[1])
        for block in blocks(len(features)):
            found.add(features[block], labels[block])
        return found

    def add(self, features: Array, labels: Array) -> None:
        """Take in features [B, d] of samples with these labels [B]. Raises DdilError where they are not finite."""
        rows = finite(features)
        for group in np.unique(labels):
            self._gathering[group].add(rows[labels == group])

    def merge(self, other: GroupMoments) -> GroupMoments:
        """The moments of both shards' samples."""
        width = self._gathering[0].width
        both = GroupMoments(len(self._gathering), width)
        for own, first, second in zip(both._gathering, self.moments(), other.moments(), strict=True):
            own.folded = Moments.merged([first, second]) if first.count or second.count else None
        return both

    def moments(self) -> list[Moments]:
        """Each group's moments."""
        return [gathering.moments() for gathering in self._gathering]

    def total(self) -> Moments:
        """The moments of all samples."""
        return Moments.merged(self.moments())

    def without(self) -> Iterator[Moments]:
        """For each group, the moments of all others' samples."""
        parts = self.moments()
        total = Moments.merged(parts)
        for group, part in enumerate(parts):
            if total.count - part.count <= len(total.mean):
                yield Moments.merged(parts[:group] + parts[group + 1 :])
            else:
                yield total.less(part)


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Consecutive slices of at most ``size``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def finite(features: Array) -> Array:
    """Features as float64. Raises DdilError where they are not finite."""
    rows = np.asarray(features, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise DdilError("features hold values that are not finite; look for broken pictures among those measured")
    return rows
