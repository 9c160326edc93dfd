"""The Fréchet distance between features, and its limit for infinitely many samples, without a matrix square root.

With a factor Σ = L Lᵀ of each covariance, tr (Σx Σy)^½ is the nuclear norm ‖Lxᵀ Ly‖_*, or Σ √λ of the
symmetric Lyᵀ Σx Ly. This module never takes the square root of a non-symmetric product, so no value is complex,
negative or NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from scipy.linalg import eigh, lapack

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.jackknife import Spread, group_labels, pseudovalues
from ddil_eval.statistics.moments import GroupMoments, Moments, blocks, finite
from ddil_eval.statistics.nuclear import nuclear_norm, nuclear_norms_without

Array = np.ndarray


def frechet_distance(x: Array, y: Array) -> float:
    """Return ‖μx − μy‖² + tr Σx + tr Σy − 2 tr (Σx Σy)^½ for features x [n, d] and y [m, d], with
    unbiased covariances.

    The distance is symmetric, real, and at least 0 for any n, m ≥ 2. It grows by about c/n as n falls. So compare
    only distances at the same n against the same reference.

    Raises:
        DdilError: there are fewer than two samples, the widths differ, or values are not finite.
    """
    return FrechetReference(y).distance(x)


class FrechetReference:
    """The Fréchet distance to one reference set, prepared once for many sets and jackknife replicates.

    The factor of a covariance is the centred features where there are no more samples than dimensions. Else it is the
    Cholesky factor, or the factor of the symmetric eigen-decomposition where the rank is not full.

    Attributes:
        moments: The moments of the reference.
        mean: The mean [d] of the reference.
        trace: tr Σ of the reference.
    """

    def __init__(self, features: Array | Moments | None) -> None:
        self.moments = features if isinstance(features, Moments) else Moments.of(_checked(features))
        self.mean = self.moments.mean
        self.trace = self.moments.trace()

    @cached_property
    def factor(self) -> Array:
        """L [d, min(m, d)] with L Lᵀ = the covariance of the reference."""
        return self.moments.factor()

    def distance(self, features: Array | Moments) -> float:
        """Return the Fréchet distance of features [n, d], or of their moments, to the reference."""
        moments = features if isinstance(features, Moments) else Moments.of(self._fitting(features))
        return self._combine(moments.mean, moments.trace(), self._root_trace(moments))

    def _root_trace(self, moments: Moments) -> float:
        """Return tr (Σx Σy)^½: where precise, as Σ √λ of the eigenvalues of Σx Σy, in a third of the time."""
        if moments.scatter is not None and self._cholesky is not None:
            # λ are the eigenvalues of the symmetric Lᵀ Σx L, with L of the reference.
            similar, failed = lapack.dsygst(moments.scatter / (moments.count - 1), self._cholesky, itype=2, lower=1)
            squares = eigh(similar, eigvals_only=True, driver="ev", check_finite=False) if failed == 0 else np.zeros(1)
            # The error of λ is about ε λ_max, of its root ε λ_max / 2√λ: too large where a λ is nearly 0.
            if squares[0] > 0:
                roots = np.sqrt(squares)
                if np.finfo(np.float64).eps * squares[-1] * (0.5 / roots).sum() < 1e-10 * roots.sum():
                    return float(roots.sum())
        return nuclear_norm(moments.factor().T @ self.factor)

    @cached_property
    def _cholesky(self) -> Array | None:
        """The Cholesky factor of the reference's covariance; None where its rank is not full, or not known to be."""
        if self.moments.scatter is None:
            return None
        try:
            return np.linalg.cholesky(self.moments.scatter / (self.moments.count - 1))
        except np.linalg.LinAlgError:
            return None

    def values(self, features: Array) -> Array:
        """Return the distance of features [n, d] as one column."""
        return np.array([self.distance(features)])

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return the distance with its pseudovalues: from each group's moments where n > d, else from ``nuclear``."""
        features = self._fitting(features)
        if len(features) > features.shape[1]:
            return self.spread_of(GroupMoments.of(features, labels), labels)
        features = finite(features)
        norm, norms = nuclear_norms_without(self._projected(features), labels)
        means, traces, counts = _means_and_traces(features, labels)
        distances = np.array(
            [
                self._combine(mean, trace, root / np.sqrt(count - 1))
                for mean, trace, count, root in zip(means, traces, counts, [norm, *norms], strict=True)
            ]
        )
        return Spread(distances[:1], pseudovalues(distances[:1], distances[1:, None], labels))

    def spread_of(self, moments: GroupMoments, labels: Array) -> Spread:
        """Return the distance with its pseudovalues from moments alone."""
        total, without = moments.leave_one_out()
        values = np.array([self.distance(total)])
        replicates = np.array([[self.distance(others)] for others in without])
        return Spread(values, pseudovalues(values, replicates, labels))

    def subset_distance(self, features: Array) -> Callable[[Array], float]:
        """Return a function from row indices to the distance of ``features[rows]``.

        The features are multiplied with the reference's factor once. So the distance of a subset costs one singular
        value decomposition of at most [rows, min(n, m, d)].
        """
        features = finite(self._fitting(features))
        projected = self._projected(features)

        def distance(rows: Array) -> float:
            chosen, chosen_projected = _checked(features[rows]), projected[rows]
            mean = chosen.mean(axis=0)
            root_trace = nuclear_norm(chosen_projected - chosen_projected.mean(axis=0)) / np.sqrt(len(chosen) - 1)
            return self._combine(mean, float(np.square(chosen - mean).sum() / (len(chosen) - 1)), root_trace)

        return distance

    def _projected(self, features: Array) -> Array:
        """Return features [n, d] less the reference's mean, times its factor: [n, min(n, m, d)]."""
        projected: Array = (features - self.mean) @ self.factor
        if projected.shape[0] < projected.shape[1]:
            # P = R'Q' with orthonormal Q': the rows of R' have the same inner products, in n dimensions.
            projected = np.linalg.qr(projected.T)[1].T
        return projected

    def _fitting(self, features: Array) -> Array:
        features = _checked(features)
        if features.shape[1] != len(self.mean):
            raise DdilError(
                f"features of width {features.shape[1]} cannot be compared with a reference of width {len(self.mean)}; "
                "use features of one metric"
            )
        return features

    def _combine(self, mean: Array, trace: float, root_trace: float) -> float:
        return max(0.0, float(np.square(mean - self.mean).sum() + trace + self.trace - 2 * root_trace))


class FrechetInfinity:
    """The limit of the Fréchet distance for infinitely many samples (FID∞; Chong and Forsyth, 2020).

    The distance of n samples is too large by about c / n. So distances lie on a line in 1/n, and the line's value at
    1/n = 0 is the limit. Here the line goes through the distance of all samples and the mean distance without each of
    20 groups: Quenouille's jackknife (1956). Every sample has the same weight, so the limit has the spread of the
    distance. The published method draws a line through random subsets; its result depends on the subsets and on the
    curvature of the line.

    The groups depend only on the features. Neither a seed nor the order of the samples changes the limit.
    """

    min_samples_per_dimension = 5.0
    """With fewer samples for each dimension the limit carries a note, because the distances leave the line."""

    def __init__(self, reference: Array | Moments | None) -> None:
        self.reference = FrechetReference(reference)

    def values(self, features: Array) -> Array:
        """Return the limit for features [n, d], n ≥ 4, as one column."""
        features = _checked(features)
        labels = _labels_by_content(features)
        pseudo = self.reference.spread(features, labels).pseudovalues
        return np.maximum(0.0, _mean_of_groups(pseudo, labels))

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return the limit, with the distance's pseudovalues by ``labels`` shifted to have the limit as their mean."""
        features, value = _checked(features), self.values(features)
        pseudo = self.reference.spread(features, labels).pseudovalues
        return Spread(value, pseudo - _mean_of_groups(pseudo, labels) + value, note=self.note(*features.shape))

    def note(self, n: int, d: int) -> str | None:
        """Return why a limit from n samples in d dimensions is not reliable, or None."""
        if n >= self.min_samples_per_dimension * d:
            return None
        return (
            f"a limit from {n:,} images is not reliable, and is not marked as better or worse: it needs "
            f"{self.min_samples_per_dimension:g} for each of the {d:,} features, "
            f"{round(self.min_samples_per_dimension * d):,}"
        )


def _labels_by_content(features: Array) -> Array:
    """Return groups that do not depend on the order of the samples: sort by a fixed projection, then draw groups."""
    direction = np.random.default_rng(0).normal(size=features.shape[1])
    projection = np.concatenate([finite(features[block]) @ direction for block in blocks(len(features))])
    labels = np.empty(len(features), dtype=np.int64)
    labels[np.argsort(projection, kind="stable")] = group_labels(len(features))
    return labels


def _means_and_traces(features: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Return mean, trace of the covariance, and number: of all samples, and without each group, [1 + groups, …]."""
    groups = np.eye(int(labels.max()) + 1)[labels]
    centre = features.mean(axis=0)
    centred = features - centre
    sizes, squares = groups.sum(axis=0), np.square(centred).sum(axis=1)
    counts = len(features) - np.array([0.0, *sizes])
    shifts = np.concatenate([np.zeros((1, len(centre))), -groups.T @ centred]) / counts[:, None]
    scatters = squares.sum() - np.array([0.0, *(groups.T @ squares)]) - counts * np.square(shifts).sum(axis=1)
    return centre + shifts, scatters / (counts - 1), counts


def _mean_of_groups(values: Array, labels: Array) -> Array:
    """Return the mean of values [groups, columns], weighted by the size of the groups."""
    return np.average(values, axis=0, weights=np.bincount(labels))


def _checked(features: Array | None) -> Array:
    if features is None or features.ndim != 2 or len(features) < 2:
        shape = None if features is None else list(features.shape)
        raise DdilError(
            f"a Fréchet distance needs features [n, d] of at least two images, not {shape}; measure more prompts"
        )
    return features
