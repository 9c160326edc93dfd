"""A value with its interval; the mean of per-prompt scores, bootstrapped, with a p-value for a difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from ddil_core.errors import DdilError

CONFIDENCE = 0.95
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from ``n`` samples (prompts or pictures). ``low`` ≤ ``value`` ≤ ``high``.

    ``p_value`` is for a difference: how often as large a one, either way, would come from cells that do not differ.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.value):
            raise DdilError(
                f"a metric is {self.value:g}, which is not finite and cannot be compared; look for broken features among those "
                "measured"
            )
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not contain its point {self.value}")


def is_difference(contrast: Array) -> bool:
    """Whether weights over cells sum to 0, so that cells which do not differ give 0."""
    return bool(abs(np.sum(contrast)) <= 1e-12 * np.abs(contrast).sum())


def bootstrap_mean(
    values: Array, contrast: Array, seed: int = 0, resamples: int = 2000, *, share: bool = False
) -> Estimate:
    """Σ contrast · mean over prompts of per-prompt scores ``values`` [n, cells], with its interval.

    Whole prompts are resampled, for all cells together, by a generator that depends on (seed, n) alone. The interval is
    Efron's BCa (bias-corrected and accelerated, 1987), for a mean. Where all prompts score the same it has no width: a
    bootstrap cannot see what did not happen, and 256 of 256 right still allows about 1 % wrong. A ``share`` of prompts, whose
    scores are 0 or 1, has Wilson's interval in its place. A difference has the p-value of a paired permutation test.

    Raises:
        DdilError: fewer than two prompts, or scores that are not finite.
    """
    contrast = np.asarray(contrast, dtype=np.float64)
    scores = np.asarray(values, dtype=np.float64) @ contrast
    n = len(scores)
    if n < 2:
        raise DdilError(f"{n} prompt is too few for a bootstrap interval; ask for at least 2")
    if not np.isfinite(scores).all():
        raise DdilError("scores hold values that are not finite; look for broken pictures among those measured")
    value = float(scores.mean())
    if share:
        low, high = score_interval(value, float(scores.std() / np.sqrt(n)), n, float(ndtri((1 + CONFIDENCE) / 2)), 1.0)
    else:
        rng = np.random.default_rng([seed, n])
        means = np.array([scores[rng.integers(0, n, n)].mean() for _ in range(resamples)])
        low, high = np.quantile(means, _bca_levels(scores, means))
    p_value = permutation_p(scores, seed) if is_difference(contrast) else None
    return Estimate(value, min(float(low), value), max(float(high), value), n, p_value)


def score_interval(value: float, error: float, n: int, t: float, highest: float) -> tuple[float, float]:
    """The rates p that ``value`` is no more than t standard errors away from, where the error is the one that p would have.

    Wilson's interval (1927), with the variance φ p (1 − p) of a share, or φ p of a rate without an upper bound, and φ from
    ``error`` in place of 1/n, as for samples that are not independent (Korn and Graubard, 1998). Near a bound the error was
    found from a handful of samples, and from none at it: one more sample, drawn independently, is taken to lie there.
    """
    upper = 1 / highest
    phi = (error**2 + 1 / n**2) / (value * (1 - upper * value) + 1 / n)
    shrink = 1 + upper * t**2 * phi
    middle = value + t**2 * phi / 2
    half = t * np.sqrt(phi * value * (1 - upper * value) + (t * phi / 2) ** 2)
    return (middle - half) / shrink, (middle + half) / shrink


def permutation_p(differences: Array, seed: int = 0, permutations: int = 9999) -> float:
    """The two-sided p-value of paired differences [n]: each prompt's sign is as likely one as the other if nothing differs.

    The share, among random signs and the observed ones, of means at least as far from 0 (Phipson and Smyth, 2010: never 0;
    at best 1 / (permutations + 1)). The signs depend on (seed, n) alone. Prompts that do not differ count for nothing.
    """
    differing = np.asarray(differences, dtype=np.float64)
    differing = differing[differing != 0]
    observed = abs(differing.sum())
    enough = observed * (1 - 1e-12)  # sums of the same terms differ by their order
    rng = np.random.default_rng([seed, len(differences), 1])
    rows = max(1, 2**22 // max(1, len(differing)))
    as_far = 0
    for start in range(0, permutations, rows):
        signs = rng.integers(0, 2, (min(rows, permutations - start), len(differing)), dtype=np.int8)
        as_far += int(np.count_nonzero(np.abs((2.0 * signs - 1) @ differing) >= enough))
    return (1 + as_far) / (1 + permutations)


def _bca_levels(scores: Array, means: Array) -> Array:
    """The two quantiles of the bootstrap's means that BCa takes for its interval."""
    centred = scores - scores.mean()
    spread = np.sqrt(np.mean(centred**2))
    acceleration = np.mean(centred**3) / (6 * np.sqrt(len(scores)) * spread**3) if spread > 0 else 0.0
    below = (np.mean(means < scores.mean()) + np.mean(means <= scores.mean())) / 2  # ties count half
    bias = ndtri(np.clip(below, 1 / len(means), 1 - 1 / len(means)))
    shifted = bias + ndtri([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return ndtr(bias + shifted / (1 - acceleration * shifted))
