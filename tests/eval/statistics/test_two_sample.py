"""Two sets of paired states: against the formulas written out, under no difference, and under a known one."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.estimate import against_zero
from ddil_eval.statistics.two_sample import (
    PairedStates,
    compare_states,
    exponential,
    kernel_distance,
    log_ratio_scores,
    probe_excess,
    variance_error,
)

RNG = np.random.default_rng(0)


def pair(n: int, shift: float, scale: float = 1.0, seed: int = 0, d: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets with shared parts, as states of one noise have."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, d))
    return shared + scale * rng.normal(size=(n, d)) + shift, shared + rng.normal(size=(n, d))


def plain_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased distance without the pairs (i, i), by loops."""
    both = np.concatenate([x, y])
    squared = [np.square(a - b).sum() for i, a in enumerate(both) for b in both[i + 1 :]]
    median, n = np.median(squared), len(x)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.square(a - b).sum() / median))

    terms = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j]) for i in range(n) for j in range(n) if i != j
    ]
    return float(np.mean(terms))


def test_the_kernel_distance_is_the_formula() -> None:
    x, y = pair(9, 0.7)
    assert kernel_distance(PairedStates.of(x, y).products()).value == pytest.approx(plain_mmd(x, y), abs=1e-12)


def test_a_swap_of_pairs_is_a_change_of_signs() -> None:
    """The permutation test relies on this: h of swapped pairs has the signs of both rows."""
    x, y = pair(8, 0.5, seed=3)
    swapped = np.array([True, False, True, True, False, False, True, False])
    a, b = np.where(swapped[:, None], y, x), np.where(swapped[:, None], x, y)
    forward, backward = (kernel_distance(PairedStates.of(*sets).products()).value for sets in ((a, b), (b, a)))
    assert forward == pytest.approx(plain_mmd(a, b), abs=1e-12) and forward == pytest.approx(backward, abs=1e-12)
    assert forward != pytest.approx(plain_mmd(x, y), abs=1e-6)


@pytest.mark.parametrize(("n", "d"), [(20, 12), (64, 512), (193, 512)])
def test_equal_sets_do_not_differ(n: int, d: int) -> None:
    """As at the first transition, which starts from noise. Products of large sets have rounding errors of their own."""
    x, _ = pair(n, 0, d=d)
    found = compare_states(x, x)
    assert (found["mmd"].value, found["mmd"].p_value) == (0, 1)
    assert (found["probe"].value, found["variance_error"].value) == (0, 0)


def test_p_values_of_one_distribution_are_even() -> None:
    tests = [compare_states(*pair(24, 0, seed=seed), seed=seed) for seed in range(60)]
    for name in ("mmd", "probe"):
        below = np.mean([float(found[name].p_value or 0) < 0.1 for found in tests])
        assert below <= 0.2, f"{name}: {below:.0%} of the p-values are below 0.1"
    assert abs(np.mean([found["probe"].value for found in tests])) < 0.03


@pytest.mark.parametrize("shift, scale", [(0.8, 1.0), (0.0, 3.0)])
def test_a_difference_is_found(shift: float, scale: float) -> None:
    """A kernel sees the mean and the spread; a linear probe sees the mean alone."""
    found = compare_states(*pair(60, shift, scale, seed=5))
    assert (found["mmd"].p_value or 1) <= 0.01 and found["mmd"].value > 0
    assert ((found["probe"].p_value or 1) < 0.01) == (shift > 0)


def test_a_probe_tells_far_sets_apart() -> None:
    x, y = pair(30, 50.0)
    found = probe_excess(PairedStates.of(x, y).products())
    assert found.value == found.high == 0.5 > found.low  # the share of right ones less chance is at most 0.5


def test_the_variance_error_is_its_formula() -> None:
    x, y = RNG.normal(size=(50, 3, 2)), 2 * RNG.normal(size=(50, 3, 2))
    found = variance_error(PairedStates.of(x, y))
    stds = [np.sqrt(states.var(axis=0, ddof=1).mean()) for states in (x, y)]
    assert found.value == pytest.approx((stds[0] - stds[1]) ** 2) and found.low <= 1.0 <= found.high


def test_the_order_of_prompts_does_not_matter_to_values() -> None:
    x, y = pair(30, 0.4)
    order = RNG.permutation(30)
    first, second = compare_states(x, y), compare_states(x[order], y[order])
    assert first["mmd"].value == pytest.approx(second["mmd"].value)
    assert first["variance_error"].value == pytest.approx(second["variance_error"].value)


def test_a_ratio_of_proportional_scores_is_exact() -> None:
    scores = RNG.uniform(1, 2, size=20)
    found = against_zero(log_ratio_scores(1.5 * scores, scores))
    ratio = exponential(found)
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx(1.5),) * 3 and ratio.p_value is None
    assert against_zero(log_ratio_scores(scores, scores)).p_value == 1


def test_intervals_of_ratios_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        shared = rng.gamma(2, size=40)
        above, below = 1.3 * shared * rng.lognormal(0, 0.3, 40), shared * rng.lognormal(0, 0.3, 40)
        found.append(against_zero(log_ratio_scores(above, below)))
    assert np.mean([e.low <= np.log(1.3) <= e.high for e in found]) > 0.9


def test_no_ratio_of_nothing() -> None:
    with pytest.raises(DdilError, match="the two models agree everywhere"):
        log_ratio_scores(np.ones(5), np.zeros(5))


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(DdilError, match="3 prompts are too few to compare states; measure at least 5"):
        compare_states(*pair(3, 0))
