"""Statistics of features, in float64: Fréchet distances, and 95 % intervals that contain their point.

Means over prompts are bootstrapped. **A Fréchet distance never is**: a resample repeats points, which shrinks the
covariance's rank and inflates the distance, so that the percentile interval misses its own point (computed on Gaussians
with d = 64, N = 1,000: point 2.51, interval [3.45, 3.79]). Set statistics get a delete-a-group jackknife, which leaves
points out and repeats none.

Values that are compared (the cells of a table) come from the same prompts, so differences and effects are linear
contrasts of one vector of cells; both functions take the contrast and resample prompts for all cells together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from ddil_core.errors import DdilError

CONFIDENCE = 0.95
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from ``n`` samples (prompts or pictures). ``low`` ≤ ``value`` ≤ ``high``."""

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not contain its point {self.value}")


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

    With a factor Σ = L Lᵀ of each covariance, tr (Σx Σy)^½ is the nuclear norm ‖Lxᵀ Ly‖_*: no square root of a
    non-symmetric product is ever taken. ``factor`` is the centred features where there are fewer samples than
    dimensions, else it comes from the symmetric eigen-decomposition of the covariance.

    Attributes:
        mean: [d].
        factor: [d, min(m, d)].
        trace: tr Σ.
    """

    def __init__(self, features: Array) -> None:
        features = _checked(features)
        self.mean = features.mean(axis=0)
        self.factor = _factor(features)
        self.trace = float(np.square(self.factor).sum())

    def distance(self, features: Array) -> float:
        """The Fréchet distance of features [n, d] to the reference."""
        features = self._fitting(features)
        factor = _factor(features)
        shared = _nuclear_norm(factor.T @ self.factor)
        return self._combine(features.mean(axis=0), float(np.square(factor).sum()), shared)

    def subset_distance(self, features: Array) -> Callable[[Array], float]:
        """A function of row indices that gives the distance of ``features[rows]``.

        Features are multiplied with the reference's factor once, so that a jackknife replicate costs one singular value
        decomposition of at most [rows, min(n, m, d)].
        """
        features = self._fitting(features)
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


def _checked(features: Array) -> Array:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise DdilError(
            f"a Fréchet distance needs features [n, d] of at least two pictures, not {list(features.shape)}; "
            "ask for more prompts"
        )
    if not np.isfinite(features).all():
        raise DdilError("features hold values that are not finite; look for broken pictures among those measured")
    return features


def _factor(features: Array) -> Array:
    """L [d, min(n, d)] with L Lᵀ = the unbiased covariance of features [n, d]."""
    count, width = features.shape
    centred = (features - features.mean(axis=0)) / np.sqrt(count - 1)
    if count < width:
        return centred.T
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def _nuclear_norm(matrix: Array) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


@dataclass(frozen=True)
class Jackknife:
    """Cells measured on one set of prompts, with what leaving out each group of prompts tells of their spread.

    ``values`` [cells]; ``pseudovalues`` [groups, cells]; ``left_out`` [groups], the prompts of each group.
    """

    values: Array
    pseudovalues: Array = field(repr=False)
    left_out: Array = field(repr=False)

    @property
    def n(self) -> int:
        return int(self.left_out.sum())

    def estimate(self, contrast: Array, *, lowest: float = -np.inf) -> Estimate:
        """Σ contrast · cells with its interval, Student's t with groups − 1 degrees of freedom.

        ``lowest`` bounds the interval from below: 0 for a distance, nothing for a difference.
        """
        contrast = np.asarray(contrast, dtype=np.float64)
        value = float(self.values @ contrast)
        half = _t_quantile(len(self.left_out) - 1) * np.sqrt(self._variance(self.pseudovalues @ contrast))
        return Estimate(value, float(max(value - half, min(lowest, value))), float(value + half), self.n)

    def cells(self, *, lowest: float = -np.inf) -> list[Estimate]:
        """Each cell by itself."""
        return [self.estimate(row, lowest=lowest) for row in np.eye(len(self.values))]

    def _variance(self, pseudovalues: Array) -> float:
        # Busing, Meijer and van der Leeden (1999): with h = n / m for a group of m, var = mean((θ̃ − θ_J)² / (h − 1)).
        inverse_share = self.n / self.left_out
        centre = np.average(pseudovalues, weights=self.left_out)
        return float(np.mean(np.square(pseudovalues - centre) / (inverse_share - 1)))


def jackknife(value_of: Callable[[Array], Array], n: int, *, groups: int = 20, seed: int = 0) -> Jackknife:
    """Delete-a-group jackknife of a statistic of ``n`` prompts.

    ``value_of`` takes the sorted indices of the prompts to keep and gives the values of all cells, [cells]. Prompts
    fall into ``groups`` groups (n of them where n is smaller) by a permutation that depends on (seed, n) alone.

    Pseudovalues h θ̂ − (h − 1) θ̂₋g take out a bias that falls as 1/n, whatever the groups' sizes, so the interval is
    that of the spread at this n; the bias itself stays in the point, as in every published Fréchet distance. The
    reference is taken as given: its own spread is not in the interval.

    Raises:
        DdilError: fewer than four prompts.
    """
    if n < 4:
        raise DdilError(f"{n} prompts are too few for a jackknife interval; ask for at least 4")
    order = np.random.default_rng([seed, n]).permutation(n)
    left_out = np.array_split(order, min(groups, n))
    everything = np.arange(n)
    values = np.asarray(value_of(everything), dtype=np.float64)
    replicates = np.stack([value_of(np.setdiff1d(everything, group)) for group in left_out])
    sizes = np.array([len(group) for group in left_out])
    inverse_share = (n / sizes)[:, None]
    return Jackknife(values, inverse_share * values - (inverse_share - 1) * replicates, sizes)


def bootstrap_mean(values: Array, contrast: Array, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Σ contrast · mean over prompts of per-prompt scores ``values`` [n, cells], with its interval.

    Whole prompts are resampled, for all cells together, by a generator that depends on (seed, n) alone. The interval is
    Efron's BCa (bias-corrected and accelerated, 1987), for a mean. Where all prompts score the same it has no width: a
    bootstrap cannot see what did not happen, and 256 of 256 right still allows about 1 % wrong (3 / n).

    Raises:
        DdilError: fewer than two prompts, or scores that are not finite.
    """
    scores = np.asarray(values, dtype=np.float64) @ np.asarray(contrast, dtype=np.float64)
    n = len(scores)
    if n < 2:
        raise DdilError(f"{n} prompt is too few for a bootstrap interval; ask for at least 2")
    if not np.isfinite(scores).all():
        raise DdilError("scores hold values that are not finite; look for broken pictures among those measured")
    rng = np.random.default_rng([seed, n])
    means = np.array([scores[rng.integers(0, n, n)].mean() for _ in range(resamples)])
    value = float(scores.mean())
    low, high = np.quantile(means, _bca_levels(scores, means))
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def _bca_levels(scores: Array, means: Array) -> Array:
    """The two quantiles of the bootstrap's means that BCa takes for its interval."""
    centred = scores - scores.mean()
    spread = np.sqrt(np.mean(centred**2))
    acceleration = np.mean(centred**3) / (6 * np.sqrt(len(scores)) * spread**3) if spread > 0 else 0.0
    below = (np.mean(means < scores.mean()) + np.mean(means <= scores.mean())) / 2  # ties count half
    bias = ndtri(np.clip(below, 1 / len(means), 1 - 1 / len(means)))
    shifted = bias + ndtri([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return ndtr(bias + shifted / (1 - acceleration * shifted))


def _t_quantile(degrees: int) -> float:
    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
