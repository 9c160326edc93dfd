"""The Fréchet distance between features, and its limit for endless samples: without a matrix square root.

With a factor Σ = L Lᵀ of each covariance, tr (Σx Σy)^½ is the nuclear norm ‖Lxᵀ Ly‖_*, or Σ √λ of the symmetric Lyᵀ Σx Ly.
No square root of a non-symmetric product is ever taken: nothing comes out complex, negative or not a number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from scipy.linalg import eigh

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.jackknife import Spread, group_labels, pseudovalues
from ddil_eval.statistics.moments import GroupMoments, Moments, blocks, finite

Array = np.ndarray


def frechet_distance(x: Array, y: Array) -> float:
    """‖μx − μy‖² + tr Σx + tr Σy − 2 tr (Σx Σy)^½ between features x [n, d] and y [m, d], with unbiased covariances.

    Symmetric in its arguments, real, and at least 0 for any n, m ≥ 2. It grows as n falls (by about c/n), so only
    distances at the same n against the same reference compare.

    Raises:
        DdilError: fewer than two samples, features of different widths, or values that are not finite.
    """
    return FrechetReference(y).distance(x)


class FrechetReference:
    """A reference set prepared once, against which many sets and jackknife replicates are measured.

    A covariance's factor is the centred features where there are no more samples than dimensions, else its Cholesky
    factor, or that of the symmetric eigen-decomposition where the rank is not full.

    Attributes:
        moments: of the reference.
        mean: [d].
        trace: tr Σ.
    """

    def __init__(self, features: Array | Moments | None) -> None:
        self.moments = features if isinstance(features, Moments) else Moments.of(_checked(features))
        self.mean = self.moments.mean
        self.trace = self.moments.trace()

    @cached_property
    def factor(self) -> Array:
        """L [d, min(m, d)] with L Lᵀ = the covariance."""
        return self.moments.factor()

    def distance(self, features: Array | Moments) -> float:
        """The Fréchet distance of features [n, d], or of their moments, to the reference."""
        moments = features if isinstance(features, Moments) else Moments.of(self._fitting(features))
        return self._combine(moments.mean, moments.trace(), self._shared(moments))

    def _shared(self, moments: Moments) -> float:
        """tr (Σx Σy)^½, as Σ √λ of the eigenvalues of Σx Σy where that is safe: in a third of the time of singular values."""
        if moments.scatter is not None and self.moments.scatter is not None:
            own, theirs = (part.scatter / (part.count - 1) for part in (moments, self.moments))  # type: ignore[operator]
            try:
                # SciPy's default driver ("gvd") takes half as long again for the same eigenvalues.
                squares = eigh(own, theirs, type=2, eigvals_only=True, driver="gv", check_finite=False)
            except np.linalg.LinAlgError:  # the reference's covariance is not of full rank
                squares = np.zeros(1)
            # An eigenvalue is off by at most about ε λ_max, its root by ε λ_max / 2√λ: too much where some are all but 0.
            if squares[0] > 0:
                roots = np.sqrt(squares)
                if np.finfo(np.float64).eps * squares[-1] * (0.5 / roots).sum() < 1e-10 * roots.sum():
                    return float(roots.sum())
        return _nuclear_norm(moments.factor().T @ self.factor)

    def values(self, features: Array) -> Array:
        """The distance as a statistic of one column."""
        return np.array([self.distance(features)])

    def spread(self, features: Array, labels: Array) -> Spread:
        """The distance and its jackknife; from each group's moments where there are more samples than dimensions."""
        features = self._fitting(features)
        if len(features) > features.shape[1]:
            return self.spread_of(GroupMoments.of(features, labels), labels)
        distance = self.subset_distance(features)
        values = np.array([distance(np.arange(len(features)))])
        replicates = np.array([[distance(np.flatnonzero(labels != group))] for group in range(labels.max() + 1)])
        return Spread(values, pseudovalues(values, replicates, labels))

    def spread_of(self, moments: GroupMoments, labels: Array) -> Spread:
        """The same from moments alone, as they were gathered while pictures came."""
        values = np.array([self.distance(moments.total())])
        replicates = np.array([[self.distance(others)] for others in moments.without()])
        return Spread(values, pseudovalues(values, replicates, labels))

    def subset_distance(self, features: Array) -> Callable[[Array], float]:
        """A function of row indices that gives the distance of ``features[rows]``.

        Features are multiplied with the reference's factor once, so that a jackknife replicate costs one singular value
        decomposition of at most [rows, min(n, m, d)].
        """
        features = finite(self._fitting(features))
        projected = (features - self.mean) @ self.factor
        if projected.shape[0] < projected.shape[1]:
            # Rows keep all their inner products in n dimensions: P = R'Q' with orthonormal Q'.
            projected = np.linalg.qr(projected.T)[1].T

        def distance(rows: Array) -> float:
            kept, seen = _checked(features[rows]), projected[rows]
            mean = kept.mean(axis=0)
            shared = _nuclear_norm(seen - seen.mean(axis=0)) / np.sqrt(len(kept) - 1)
            return self._combine(mean, float(np.square(kept - mean).sum() / (len(kept) - 1)), shared)

        return distance

    def _fitting(self, features: Array) -> Array:
        features = _checked(features)
        if features.shape[1] != len(self.mean):
            raise DdilError(
                f"features of width {features.shape[1]} cannot be compared with a reference of width {len(self.mean)}; "
                "take both from the same metric"
            )
        return features

    def _combine(self, mean: Array, trace: float, shared: float) -> float:
        return max(0.0, float(np.square(mean - self.mean).sum() + trace + self.trace - 2 * shared))


class FrechetInfinity:
    """The Fréchet distance's limit for endlessly many samples (FID∞; Chong and Forsyth, 2020).

    A distance of n samples is too large by about c / n: its values lie on a line in 1/n, whose value at 1/n = 0 is the limit.
    The line here goes through the distance of all samples and the mean of those without each of 20 groups, which is
    Quenouille's jackknife (1956). Every sample counts alike, so that the limit has the spread of the distance itself. A line
    through random subsets down to a fraction of the samples, as published, depends on their luck and on the line's bend.

    Groups are drawn from the samples in an order that follows from the features alone: neither a seed nor the order of the
    samples changes the limit.
    """

    fewest = 5.0
    """Samples a dimension below which the limit carries a note: there the distances bend away from the line."""

    def __init__(self, reference: Array | Moments | None) -> None:
        self.reference = FrechetReference(reference)

    def values(self, features: Array) -> Array:
        """The limit for features [n, d], n ≥ 4, as a statistic of one column."""
        features = _checked(features)
        labels = _labels_by_content(features)
        found = self.reference.spread(features, labels).pseudovalues
        return np.maximum(0.0, _mean_of_groups(found, labels))

    def spread(self, features: Array, labels: Array) -> Spread:
        """The limit, and the distance's pseudovalues by ``labels``, moved to it."""
        features, value = _checked(features), self.values(features)
        found = self.reference.spread(features, labels).pseudovalues
        return Spread(value, found - _mean_of_groups(found, labels) + value, note=self.note(*features.shape))

    def note(self, n: int, d: int) -> str | None:
        """Why a limit of n samples in d dimensions is not to be trusted, or None."""
        if n >= self.fewest * d:
            return None
        return (
            f"a limit from {n:,} pictures is not to be trusted, and is not marked as better or worse: it takes "
            f"{self.fewest:g} for each of the {d:,} features, {round(self.fewest * d):,}"
        )


def _labels_by_content(features: Array) -> Array:
    """Groups of a jackknife that do not depend on the order of the samples: drawn after sorting by a fixed projection."""
    direction = np.random.default_rng(0).normal(size=features.shape[1])
    place = np.concatenate([finite(features[block]) @ direction for block in blocks(len(features))])
    labels = np.empty(len(features), dtype=np.int64)
    labels[np.argsort(place, kind="stable")] = group_labels(len(features))
    return labels


def _mean_of_groups(values: Array, labels: Array) -> Array:
    """The mean of values [groups, columns], each group by its size."""
    return np.average(values, axis=0, weights=np.bincount(labels))


def _checked(features: Array | None) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        shape = None if features is None else list(features.shape)
        raise DdilError(
            f"a Fréchet distance needs features [n, d] of at least two pictures, not {shape}; ask for more prompts"
        )
    return features


def _nuclear_norm(matrix: Array) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False).sum())
