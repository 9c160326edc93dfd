"""Means over training seeds and prompts, against the formula and against data with known variances."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import f as f_distribution

from ddil_core.support.errors import DdilError
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


def test_one_seed_is_too_few() -> None:
    with pytest.raises(DdilError, match="^1 seeds and 9 prompts are too few; measure at least 2 of each$"):
        two_way(np.ones((1, 9)), difference=True)
