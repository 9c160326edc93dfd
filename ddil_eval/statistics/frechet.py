"""The Fréchet distance between features, and its limit for endless samples: without a matrix square root.

With a factor Σ = L Lᵀ of each covariance, tr (Σx Σy)^½ is the nuclear norm ‖Lxᵀ Ly‖_*, or Σ √λ of the symmetric Lyᵀ Σx Ly.
No square root of a non-symmetric product is ever taken: nothing comes out complex, negative or not a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from scipy.linalg import eigh

from ddil_core.errors import DdilError
from ddil_eval.statistics.jackknife import Spread, group_labels, pseudovalues
from ddil_eval.statistics.moments import GroupMoments, Moments, finite

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
                squares = eigh(
                    own, theirs, type=2, eigvals_only=True, overwrite_a=True, overwrite_b=True, check_finite=False
                )
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
    """The Fréchet distance's limit for endlessly many samples (Chong and Forsyth, 2020).

    A distance of n samples is too large by about c / n. It is measured at 15 sizes, from 30 % of the samples to all, and
    a line in 1/n is fitted by least squares; its value at 1/n = 0 is the result. Each size is the union of the first
    groups of a jackknife, so that the groups' moments are all that is needed.

    The interval: to first order a distance is the mean of the groups' influences, so the line's value is a weighted mean
    of them, with weights that follow from the fit. The influences are the pseudovalues of the distance itself.
    """

    points = 15

    def __init__(self, reference: Array | Moments | None) -> None:
        self.reference = FrechetReference(reference)

    def values(self, features: Array) -> Array:
        """The limit for features [n, d], n ≥ 4, as a statistic of one column; sizes by the labels of seed 0."""
        moments = GroupMoments.of(_checked(features), group_labels(len(features)))
        return np.array([self._limit(moments.moments())[0]])

    def spread(self, features: Array, labels: Array) -> Spread:
        """The limit and its pseudovalues; ``labels`` say in which order groups are taken in."""
        moments = GroupMoments.of(_checked(features), labels)
        value, weights = self._limit(moments.moments())
        influences = self.reference.spread(features, labels).pseudovalues[:, 0]
        share = np.bincount(labels) / len(labels)
        apart = (weights / share) * (influences - np.average(influences, weights=share))
        return Spread(np.array([value]), (value + apart)[:, None])

    def _limit(self, groups: Sequence[Moments]) -> tuple[float, Array]:
        """The line's value at 1/n = 0, and the weight [groups] of each group's influence in it."""
        first = max(2, len(groups) - self.points + 1)
        unions = [Moments.merged(groups[:first])]
        for part in groups[first:]:
            unions.append(Moments.merged([unions[-1], part]))
        distances = np.array([self.reference.distance(union) for union in unions])
        sizes = np.array([union.count for union in unions], dtype=np.float64)
        line = np.stack([np.ones_like(sizes), 1 / sizes], axis=1)
        at_zero = np.linalg.pinv(line)[0]  # the value at 0 is Σ at_zero · distances
        members = np.array(
            [[part.count * (place < first + k) for place, part in enumerate(groups)] for k in range(len(unions))]
        )
        return max(0.0, float(at_zero @ distances)), (at_zero / sizes) @ members


def _checked(features: Array | None) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        shape = None if features is None else list(features.shape)
        raise DdilError(
            f"a Fréchet distance needs features [n, d] of at least two pictures, not {shape}; ask for more prompts"
        )
    return features


def _nuclear_norm(matrix: Array) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False).sum())
