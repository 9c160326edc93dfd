"""Means over training seeds and prompts, against the formula and against data with known variances."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from ddil_core.support.errors import DdilError
from ddil_eval.statistics import Estimate, Jackknife, estimate_mean
from ddil_eval.statistics.independent import independent_difference
from ddil_eval.statistics.two_sample import exponential
from ddil_eval.statistics.two_way import two_way


def crossed(rng: np.random.Generator, seeds: int, prompts: int, sd: tuple[float, float, float]) -> np.ndarray:
    """Scores [seeds, prompts] with mean 1: an effect of the seed, one of the prompt, and one of both."""
    of_seed, of_prompt, of_both = sd
    return (
        1
        + of_seed * rng.normal(size=(seeds, 1))
        + of_prompt * rng.normal(size=(1, prompts))
        + of_both * rng.normal(size=(seeds, prompts))
    )


@pytest.mark.parametrize("sd", [(1.0, 0.3, 0.5), (0.0, 2.0, 0.5), (0.0, 0.0, 1.0)])
def test_intervals_hold_the_mean_whatever_varies(sd: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    found = [two_way(crossed(rng, 5, 60, sd), difference=True).mean for _ in range(400)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) > 0.93
    assert all((one.low > 0 or one.high < 0) == (one.p_value is not None and one.p_value < 0.05) for one in found)


def test_an_interval_over_seeds_alone_or_prompts_alone_is_too_narrow() -> None:
    rng = np.random.default_rng(1)
    scores = crossed(rng, 5, 60, (0.5, 2.0, 0.1))
    both = two_way(scores, difference=False)
    half = (both.mean.high - both.mean.low) / 2
    assert both.mean.p_value is None
    assert both.seeds.value == pytest.approx(scores.mean(1).std(ddof=1))
    assert both.prompts.value == pytest.approx(scores.mean(0).std(ddof=1))
    assert half > 2 * both.prompts.value / np.sqrt(60)  # the standard error over prompts is one part of two


def test_the_test_is_clarks_min_f() -> None:
    scores = crossed(np.random.default_rng(2), 4, 30, (0.5, 1.0, 0.5))
    mean = scores.mean()
    f1 = mean**2 / (scores.mean(1).var(ddof=1) / 4)
    f2 = mean**2 / (scores.mean(0).var(ddof=1) / 30)
    degrees = (f1 + f2) ** 2 / (f1**2 / 29 + f2**2 / 3)
    expected = f_distribution.sf(f1 * f2 / (f1 + f2), 1, degrees)
    assert two_way(scores, difference=True).mean.p_value == pytest.approx(expected)


def test_means_and_set_statistics_over_seeds_have_the_intervals_of_two_way() -> None:
    """The mean is a set statistic too, whose pseudovalues are the means of its groups."""
    scores = crossed(np.random.default_rng(3), 5, 40, (0.5, 1.0, 0.5))
    mean, each = np.full(5, 1 / 5), np.eye(5)
    expected = two_way(scores, difference=False).mean
    assert_alike(estimate_mean(scores.T, mean, [each]), expected)
    groups = Jackknife(scores.mean(axis=1), scores.T, np.ones(40, dtype=int))
    assert_alike(groups.estimate(mean, [each]), expected)
    paired = np.array([0.5, 0.5, -0.5, -0.5, 0.0]), np.array([[1, 0, -1, 0, 0], [0, 1, 0, -1, 0]])
    against = two_way(scores[:2] - scores[2:4], difference=True).mean
    assert_alike(estimate_mean(scores.T, paired[0], paired[1:]), against)
    assert_alike(groups.estimate(paired[0], paired[1:]), against)


def test_an_estimate_over_seeds_has_satterthwaites_degrees_of_freedom() -> None:
    scores = crossed(np.random.default_rng(7), 5, 40, (0.5, 1.0, 0.5))
    parts = scores.mean(1).var(ddof=1) / 5, scores.mean(0).var(ddof=1) / 40
    expected = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 39)
    mean, each = np.full(5, 1 / 5), np.eye(5)
    groups = Jackknife(scores.mean(axis=1), scores.T, np.ones(40, dtype=int))
    found = [two_way(scores, difference=False).mean, estimate_mean(scores.T, mean, [each])]
    found += [groups.estimate(mean, [each]), exponential(found[0])]
    assert [one.degrees for one in found] == pytest.approx([expected] * 4)
    assert estimate_mean(scores.T, mean).degrees is None and groups.estimate(mean).degrees is None


def test_a_rate_of_seeds_that_are_all_right_is_as_sure_as_one_with_one_mistake() -> None:
    """The two parts of the variance are equal then. With one degree of freedom the low end would be 0.38."""
    alone, each = np.full(5, 0.2), [np.eye(5)]
    right = np.ones((100, 5))
    sure = estimate_mean(right, alone, each, rate=True)
    assert sure.degrees == pytest.approx(4 / (1 / 99 + 1 / 4)) and sure.high == pytest.approx(1)
    right[0, 0] = 0
    one_wrong = estimate_mean(right, alone, each, rate=True)
    assert one_wrong.degrees == pytest.approx(sure.degrees, rel=0.02)
    assert one_wrong.low == pytest.approx(sure.low, abs=1e-3) and sure.low > 0.95


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -1.0]])
def test_a_rate_over_seeds_has_the_degrees_of_its_own_standard_error(weights: list[float]) -> None:
    """A single rate has its plain standard error, and a difference one more prompt of each seed that differs."""
    rng = np.random.default_rng(8)
    right, contrast = (rng.random((50, 2)) < 0.8).astype(float), np.array(weights)
    variance = (right @ contrast).var() / 50 + (0 if min(weights) > 0 else (contrast @ contrast) / 2 / 50**2)
    seeds = (right.mean(axis=0) * [1, 1 if min(weights) > 0 else -1]).var(ddof=1) / 2
    expected = (variance + seeds) ** 2 / (variance**2 / 49 + seeds**2)
    each = np.diag(np.sign(contrast))
    assert estimate_mean(right, contrast, [each], rate=True).degrees == pytest.approx(expected)
    assert estimate_mean(right, contrast, rate=True).degrees is None


def test_unpaired_families_of_seeds_add_their_variances() -> None:
    scores = crossed(np.random.default_rng(4), 8, 40, (1.0, 0.5, 0.5))
    families = np.eye(8)[:5], np.eye(8)[5:]
    contrast = families[0].mean(axis=0) - families[1].mean(axis=0)
    found = estimate_mean(scores.T, contrast, families)
    means = scores.mean(axis=1)
    parts = [means[:5].var(ddof=1) / 5, means[5:].var(ddof=1) / 3, (contrast @ scores).var(ddof=1) / 40]
    degrees = sum(parts) ** 2 / sum(part**2 / freedom for part, freedom in zip(parts, (4, 2, 39), strict=True))
    assert found.high - found.value == pytest.approx(t_distribution.ppf(0.975, degrees) * np.sqrt(sum(parts)))
    assert found.p_value == pytest.approx(2 * t_distribution.sf(abs(found.value) / np.sqrt(sum(parts)), degrees))


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_rates_over_seeds_hold_the_true_rate(spread: float) -> None:
    """Each seed has a rate of its own around 0.9, and prompts differ in how hard they are."""
    rng, held = np.random.default_rng(5), []
    for _ in range(400):
        ease = rng.normal(0, 0.05, (200, 1))
        rates = 0.9 + ease + rng.normal(0, spread, 5)
        found = estimate_mean(rng.random((200, 5)) < rates, np.full(5, 0.2), [np.eye(5)], rate=True)
        held.append(found.low <= 0.9 <= found.high <= 1)
    assert np.mean(held) > 0.93


def test_equal_seeds_leave_an_interval_over_prompts() -> None:
    right = np.repeat(np.random.default_rng(6).random((200, 1)) < 0.9, 2, axis=1)
    found = estimate_mean(right, np.full(2, 0.5), [np.eye(2)], rate=True)
    alone = estimate_mean(right[:, :1], [1], rate=True)
    assert (found.value, found.low) == (alone.value, pytest.approx(alone.low, abs=1e-3))


def assert_alike(found: Estimate, expected: Estimate) -> None:
    for part in ("value", "low", "high", "p_value"):
        assert getattr(found, part) == pytest.approx(getattr(expected, part)), part


def test_one_seed_is_too_few() -> None:
    with pytest.raises(DdilError, match="^1 seeds and 9 prompts are too few; measure at least 2 of each$"):
        two_way(np.ones((1, 9)), difference=True)


@pytest.mark.parametrize("sd", [(0.3, 1.0, 0.5), (0.1, 2.0, 0.5), (1.0, 0.3, 0.5)])
def test_two_means_measured_apart_differ_as_often_as_their_level_says(sd: tuple[float, float, float]) -> None:
    """Both are over their own seeds and prompts. Their number of seeds less one would find almost nothing at 1 %."""
    rng, satterthwaite, few = np.random.default_rng(9), [], []
    for _ in range(4000):
        new, old = (two_way(crossed(rng, 5, 30, sd), difference=False).mean for _ in range(2))
        degrees = min(new.degrees or 0.0, old.degrees or 0.0)
        satterthwaite.append(independent_difference(new, old, degrees).p_value or 0.0)
        few.append(independent_difference(new, old, 4).p_value or 0.0)
    p_values = np.array(satterthwaite)
    for level in (0.05, 0.01, 0.002):
        error = np.sqrt(level * (1 - level) / len(p_values))
        assert np.mean(p_values < level) < level + 3 * error
    assert np.mean(p_values < 0.05) > 0.02  # the intervals alone decide at 5 %
    if sd[0] < sd[1]:
        assert np.mean(p_values < 0.01) > 3 * np.mean(np.array(few) < 0.01)
