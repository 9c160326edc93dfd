"""Do two sets of paired states come from one distribution? A kernel test, a linear probe, and the variance error.

Row i of the two sets belongs to one prompt and one noise. Under the hypothesis that the two sets have one distribution,
the two rows of a pair may be swapped. So the permutation test swaps pairs, and a probe is trained on other pairs than
it is tested on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.estimate import CONFIDENCE, Estimate, estimate_mean
from ddil_eval.statistics.moments import finite

Array = np.ndarray
PERMUTATIONS = 999
FOLDS = 5
RIDGE = 1.0
"""The probe's penalty, as a share of the mean squared norm of a state."""
EQUAL = 1e-12
"""Kernels, which are at most 1, and scores, which estimate ±1, are 0 below this: float32 states differ by more."""


@dataclass(frozen=True)
class PairedStates:
    """Two sets of states with paired rows, as float64 and around their common mean.

    Attributes:
        x: [n, d].
        y: [n, d].
    """

    x: Array
    y: Array

    @classmethod
    def of(cls, x: Array, y: Array) -> PairedStates:
        """Flatten states [n, …] and centre them.

        Raises:
            DdilError: there are fewer than ``FOLDS`` pairs, or a state is not finite.
        """
        if len(x) < FOLDS:
            raise DdilError(f"{len(x)} prompts are too few to compare states; measure at least {FOLDS}")
        x, y = (finite(states.reshape(len(states), -1)) for states in (x, y))
        origin = (x.mean(axis=0) + y.mean(axis=0)) / 2
        return cls(x - origin, y - origin)

    def products(self) -> Array:
        """Return the inner products of all rows, x first, [2n, 2n]."""
        both = np.concatenate([self.x, self.y])
        return both @ both.T


def compare_states(x: Array, y: Array, seed: int = 0) -> dict[str, Estimate]:
    """Compare two sets of paired states [n, …] by the three measures below.

    Returns:
        ``mmd``: the kernel distance, with the p-value of the permutation test; ``probe``: how far the share of states
        that a linear probe tells apart exceeds chance, at most 0.5; ``variance_error``.
    """
    pair = PairedStates.of(x, y)
    products = pair.products()
    return {
        "mmd": kernel_distance(products, seed),
        "probe": probe_excess(products, seed),
        "variance_error": variance_error(pair),
    }


def kernel_distance(products: Array, seed: int = 0) -> Estimate:
    """Return the squared maximum mean discrepancy (Gretton et al., 2012) of paired sets, and its permutation test.

    The kernel is exp(−‖a − b‖²/m), with the median m of the squared distances. With h_ij = k(x_i, x_j) + k(y_i, y_j) −
    k(x_i, y_j) − k(y_i, x_j), the distance is the mean of h_ij over i ≠ j. A swap of pair i changes the sign of row and
    column i, so a permutation is a vector of signs.

    Args:
        products: The inner products of ``PairedStates``.
        seed: The seed of the permutations.

    Returns:
        The distance, with the jackknife's interval and the share of permutations that reach it.
    """
    n = len(products) // 2
    squared = np.diag(products)
    distances = np.maximum(squared[:, None] + squared - 2 * products, 0.0)
    median = np.median(distances[np.triu_indices(2 * n, 1)])
    kernel = np.exp(-distances / max(median, np.finfo(np.float64).tiny))
    h = kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]
    np.fill_diagonal(h, 0.0)
    h[np.abs(h) < EQUAL] = 0.0  # equal pairs leave rounding errors, which are no evidence
    signs = np.random.default_rng([seed, n]).choice([-1.0, 1.0], size=(PERMUTATIONS, n))
    permuted = np.einsum("pi,pi->p", signs @ h, signs)
    total = h.sum()
    # equal sums in another order differ by rounding
    reached = np.count_nonzero(permuted >= total - 1e-9 * np.abs(h).sum())
    value = total / (n * (n - 1))
    left_out = (total - 2 * h.sum(axis=1)) / ((n - 1) * (n - 2))
    low, high = _jackknife_interval(value, left_out)
    return Estimate(value, low, high, n, (1 + reached) / (1 + PERMUTATIONS))


def probe_excess(products: Array, seed: int = 0) -> Estimate:
    """Return the share of states that a linear probe assigns to the right set, less 0.5, which is chance.

    The probe is a ridge regression on the set's sign. Each pair is tested by a probe of other pairs (``FOLDS`` folds).
    A state on the boundary counts as half right.

    Args:
        products: The inner products of ``PairedStates``.
        seed: The seed of the folds.
    """
    n = len(products) // 2
    signs = np.repeat([1.0, -1.0], n)
    right = np.empty(2 * n)
    for held_out in np.array_split(np.random.default_rng([seed, n, 1]).permutation(n), FOLDS):
        tested = np.concatenate([held_out, held_out + n])
        trained = np.setdiff1d(np.arange(2 * n), tested)
        inside = products[np.ix_(trained, trained)]
        penalty = RIDGE * max(np.trace(inside) / len(trained), np.finfo(np.float64).tiny)
        weights = np.linalg.solve(inside + penalty * np.eye(len(trained)), signs[trained])
        scores = products[np.ix_(tested, trained)] @ weights * signs[tested]
        scores[np.abs(scores) < EQUAL] = 0.0
        right[tested] = (1 + np.sign(scores)) / 2
    shares = np.stack([(right[:n] + right[n:]) / 2, np.full(n, 0.5)], axis=1)
    found = estimate_mean(shares, np.array([1.0, -1.0]), rate=True)
    return replace(found, low=max(found.low, -0.5), high=min(found.high, 0.5))


def variance_error(pair: PairedStates) -> Estimate:
    """Return (s_x − s_y)², with s² the mean over all entries of the variance over the samples.

    This is the measure δ of Ning et al., 2308.15321, between the states of a rollout and those of the reference.
    """
    deviations, variances = zip(*(_variances(states) for states in (pair.x, pair.y)), strict=True)
    n = len(pair.x)
    value = float((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2)
    left_out = [
        np.sqrt(np.maximum((n - 1) * variance - n / (n - 1) * deviation, 0.0) / (n - 2))
        for deviation, variance in zip(deviations, variances, strict=True)
    ]
    low, high = _jackknife_interval(value, (left_out[0] - left_out[1]) ** 2)
    return Estimate(value, max(low, 0.0), high, n)


def _variances(states: Array) -> tuple[Array, float]:
    """Return the mean squared deviation of each state [n], and the mean variance of the entries."""
    deviations = np.square(states - states.mean(axis=0)).mean(axis=1)
    return deviations, float(deviations.sum() / (len(states) - 1))


def _jackknife_interval(value: float, left_out: Array) -> tuple[float, float]:
    """Return Student's interval with the delete-one jackknife's standard error."""
    n = len(left_out)
    error = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * error)
    return value - half, value + half


def log_ratio_scores(above: Array, below: Array) -> Array:
    """Return a score [n] for each prompt: the mean is ln(mean(above)/mean(below)), the spread is the delta method's.

    Args:
        above: Scores [n], at least 0, with a mean above 0.
        below: Scores [n] of the same prompts, likewise.

    Raises:
        DdilError: a mean is 0, so that there is no ratio.
    """
    if min(above.mean(), below.mean()) <= 0:
        raise DdilError("a ratio needs scores above 0; the two models agree everywhere")
    return np.log(above.mean() / below.mean()) + above / above.mean() - below / below.mean()


def exponential(logarithm: Estimate) -> Estimate:
    """Return the ratio whose logarithm was estimated. It is no difference, and so has no p-value."""
    value, low, high = (float(np.exp(end)) for end in (logarithm.value, logarithm.low, logarithm.high))
    return Estimate(value, low, high, logarithm.n, degrees=logarithm.degrees)
