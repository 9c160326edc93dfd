"""Mean and scatter of features, in float64, added up in memory that does not grow with the number of samples.

Up to d samples, the rows themselves are kept: they need no more memory than a covariance and lose no precision. Beyond
d samples, the mean and the scatter Σ (x − μ)(x − μ)ᵀ are kept. Parts merge by the identity of Chan, Golub and
LeVeque (1979).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ddil_core.support.errors import DdilError

Array = np.ndarray
BLOCK = 1024
"""Rows that are read at once from features that may lie on disk."""


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of a set of samples.

    Attributes:
        count: The number of samples.
        mean: [d].
        scatter: Σ (x − μ)(x − μ)ᵀ [d, d], where count > d.
        rows: The samples [count, d], where count ≤ d.
    """

    count: int
    mean: Array
    scatter: Array | None = field(default=None, repr=False)
    rows: Array | None = field(default=None, repr=False)

    @staticmethod
    def of(features: Array) -> Moments:
        """Return the moments of features [n, d], n ≥ 1, read block by block. Refuse values that are not finite."""
        if features.ndim != 2 or len(features) == 0:
            raise DdilError(f"moments need features [n, d] of at least one image, not {list(features.shape)}")
        accumulator = _Accumulator(features.shape[1])
        for block in blocks(len(features)):
            accumulator.add(finite(features[block]))
        return accumulator.moments()

    @staticmethod
    def merged(parts: Iterable[Moments]) -> Moments:
        """Return the moments of the samples of all parts, in the order of the parts."""
        parts = [part for part in parts if part.count]
        count, width = sum(part.count for part in parts), len(parts[0].mean)
        rows = [part.rows for part in parts if part.rows is not None]
        if len(rows) == len(parts) and count <= width:
            all_rows = np.concatenate(rows)
            return Moments(count, all_rows.mean(axis=0), rows=all_rows)
        mean = np.asarray(sum(part.count * part.mean for part in parts) / count)
        between = np.stack([np.sqrt(part.count) * (part.mean - mean) for part in parts])
        scatter = between.T @ between
        for part in parts:
            scatter += part.full_scatter()
        return Moments(count, mean, scatter=scatter)

    def less(self, part: Moments) -> Moments:
        """Return the moments without those of a part of the samples. More than d samples must remain."""
        count = self.count - part.count
        mean = (self.count * self.mean - part.count * part.mean) / count
        between = np.sqrt(self.count * part.count / count) * (part.mean - self.mean)
        scatter = self.full_scatter() - part.full_scatter() - np.outer(between, between)
        return Moments(count, mean, scatter=scatter)

    def full_scatter(self) -> Array:
        """Return Σ (x − μ)(x − μ)ᵀ [d, d], computed from the rows where only rows are kept."""
        if self.scatter is not None:
            return self.scatter
        assert self.rows is not None
        centred = self.rows - self.mean
        return centred.T @ centred

    def factor(self) -> Array:
        """Return L [d, min(count, d)] with L Lᵀ = the unbiased covariance; count ≥ 2."""
        if self.rows is not None:
            return (self.rows - self.mean).T / np.sqrt(self.count - 1)
        covariance = self.full_scatter() / (self.count - 1)
        try:
            return np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:  # the rank is not full
            values, vectors = np.linalg.eigh(covariance)
            return vectors * np.sqrt(np.maximum(values, 0.0))

    def trace(self) -> float:
        """Return the trace of the unbiased covariance; count ≥ 2."""
        if self.rows is not None:
            return float(np.square(self.rows - self.mean).sum() / (self.count - 1))
        return float(np.trace(self.full_scatter()) / (self.count - 1))


class _Accumulator:
    """Add rows up to moments: keep the first d rows, then merge one block at a time."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.merged: Moments | None = None
        self.waiting: list[Array] = []
        self.count = 0

    def add(self, rows: Array) -> None:
        self.waiting.append(rows)
        self.count += len(rows)
        if self.count > (self.width if self.merged is None else BLOCK):
            self.merged, self.waiting, self.count = self.moments(), [], 0

    def moments(self) -> Moments:
        parts = [] if self.merged is None else [self.merged]
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
    """The moments of each group of a jackknife, from batches in any order. The interval of a Fréchet distance needs no
    more.

    The memory is at most groups · d² numbers, for any number of images.
    """

    def __init__(self, groups: int, width: int) -> None:
        self._accumulators = [_Accumulator(width) for _ in range(groups)]

    @staticmethod
    def of(features: Array, labels: Array) -> GroupMoments:
        """Return the moments of features [n, d] by their labels [n], read block by block."""
        moments = GroupMoments(int(labels.max()) + 1, features.shape[1])
        for block in blocks(len(features)):
            moments.add(features[block], labels[block])
        return moments

    def add(self, features: Array, labels: Array) -> None:
        """Add features [B, d] of samples with labels [B]. Raises DdilError where features are not finite."""
        rows = finite(features)
        for group in np.unique(labels):
            self._accumulators[group].add(rows[labels == group])

    def moments(self) -> list[Moments]:
        """Return the moments of each group."""
        return [accumulator.moments() for accumulator in self._accumulators]

    def leave_one_out(self) -> tuple[Moments, Iterator[Moments]]:
        """Return the moments of all samples, and for each group those of all other samples. Groups merge once."""
        parts = self.moments()
        total = Moments.merged(parts)

        def without() -> Iterator[Moments]:
            for group, part in enumerate(parts):
                if total.count - part.count <= len(total.mean):
                    yield Moments.merged(parts[:group] + parts[group + 1 :])
                else:
                    yield total.less(part)

        return total, without()


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Yield consecutive slices of at most ``size`` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def finite(features: Array, dtype: type[np.floating] = np.float64) -> Array:
    """Return features as ``dtype``. Raises DdilError where they are not finite."""
    rows = np.asarray(features, dtype=dtype)
    if not np.isfinite(rows).all():
        raise DdilError("features hold values that are not finite; check the measured images for broken ones")
    return rows
