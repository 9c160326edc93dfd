"""p-values of paired differences, against exact tests and under no difference."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.stats

from ddil_core.support.errors import DdilError
from ddil_eval.statistics import Estimate, FrechetReference, estimate_mean
from tests.jackknife import jackknife


def mean_of(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return values[rows].mean(axis=0)


def test_only_a_difference_has_a_p_value() -> None:
    scores = np.random.default_rng(23).normal(size=(50, 3))
    cells = jackknife(partial(mean_of, scores), 50)
    for estimate in (estimate_mean(scores, [0, 1, 0]), cells.estimate([0, 1, 0])):
        assert estimate.p_value is None
    for estimate in (estimate_mean(scores, [0.5, 0.5, -1]), cells.estimate([0.5, 0.5, -1])):
        assert estimate.p_value is not None and 0 < estimate.p_value <= 1


def excludes_0(estimate: Estimate) -> bool:
    return estimate.low > 0 or estimate.high < 0


def random_scores(rng: np.random.Generator) -> np.ndarray:
    """Scores of three cells on shared prompts [n, 3]: of any number, shape and size, many or few of them equal."""
    n = int(rng.integers(2, 80))
    common = rng.normal(size=(n, 1)) * rng.exponential()
    own = [rng.normal, rng.exponential, rng.standard_cauchy][rng.integers(3)](size=(n, 3)) * rng.exponential()
    scores = common + rng.exponential(0.3) * np.arange(3) + np.where(rng.random((n, 3)) < rng.random(), 0.0, own)
    return np.asarray(scores * 10.0 ** rng.integers(-8, 8))


@pytest.mark.parametrize("rate", [False, True])
def test_a_p_value_is_below_5_percent_exactly_where_the_interval_excludes_0(rate: bool) -> None:
    """And a difference turned round is the same, with its sign turned."""
    rng, found = np.random.default_rng(24), []
    for _ in range(1000):
        if rate:
            levels = int(rng.choice([1, 1, 2, 5]))  # scores of 0 or 1, or shares such as 2 of 5
            share = rng.choice([0.5, 0.9, 0.97, 0.99]) - np.array([0, 0.02, 0.1])
            scores = rng.binomial(levels, share, size=(int(rng.integers(2, 300)), 3)) / levels
        else:
            scores = random_scores(rng)
        contrast = np.array([[1, -1, 0], [1, 0, -1], [0.5, 0.5, -1]])[rng.integers(3)]
        one, other = estimate_mean(scores, contrast, rate=rate), estimate_mean(scores, -contrast, rate=rate)
        assert one.p_value is not None and (one.p_value < 0.05) == excludes_0(one)
        assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low), rel=1e-9)
        assert other.p_value == pytest.approx(one.p_value, rel=1e-6)
        found.append(excludes_0(one))
    assert 0.1 < np.mean(found) < 0.9


def test_sets_have_p_values_that_agree_with_their_intervals() -> None:
    rng = np.random.default_rng(29)
    for seed in range(100):
        n = int(rng.integers(4, 60))
        values = rng.normal(size=(n, 2)) + rng.exponential(0.5, size=2)
        cells = jackknife(partial(mean_of, values), n, seed=seed)
        for rate in (False, True):
            one, other = (cells.estimate(np.array(contrast), rate=rate) for contrast in ([1, -1], [-1, 1]))
            assert one.p_value == other.p_value and (one.p_value < 0.05) == excludes_0(one)
            assert (other.low, other.high) == pytest.approx((-one.high, -one.low))


def binomial(n: int, p: float) -> np.ndarray:
    return scipy.stats.binom.pmf(np.arange(n + 1), n, p)


@pytest.mark.parametrize("n", [16, 64, 256, 1000])
def test_the_interval_of_a_difference_of_shares_covers(n: int) -> None:
    """Exact coverage, summed over all that may be seen; near 1 an interval without the prompt that is added holds .1 to .9."""
    worst = 1.0
    for first, second in (
        (0.5, 0.5),
        (0.9, 0.9),
        (0.97, 0.97),
        (0.99, 0.99),
        (0.5, 0.6),
        (0.97, 0.9),
        (0.99, 0.97),
        (0.99, 0.5),
    ):
        for correlated in (0.0, 0.9):  # from independent to as alike as the two shares allow
            both = first * second + correlated * (min(first, second) - first * second)
            only_first, only_second, truth = first - both, second - both, first - second
            covered = 0.0
            for a, chance in enumerate(binomial(n, only_first)):
                if chance < 1e-7:
                    continue
                b = np.arange(n - a + 1)
                mean = (a - b) / n
                error = np.hypot(np.sqrt((a + b) / n - mean**2) / np.sqrt(n), 1 / n)
                inside = np.abs(mean - truth) <= scipy.stats.t.ppf(0.975, n - 1) * error + 1e-12
                covered += chance * binomial(n - a, only_second / (1 - only_first))[inside].sum()
            worst = min(worst, covered)
    assert worst >= 0.93


def test_the_interval_of_a_difference_of_shares_is_the_one_whose_coverage_was_summed() -> None:
    right = np.zeros((64, 2))
    right[:60, 0], right[5:63, 1] = 1, 1  # five that the first alone has, three that the second alone has
    found, mean = estimate_mean(right, [1, -1], rate=True), 2 / 64
    error = np.hypot(np.sqrt(8 / 64 - mean**2) / 8, 1 / 64)
    half = scipy.stats.t.ppf(0.975, 63) * error
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(mean / error, 63))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("n", [2, 16, 1000])
def test_shares_of_which_no_prompt_differs_may_still_differ(share: float, n: int) -> None:
    found = estimate_mean(np.full((n, 2), share), [1, -1], rate=True)
    half = min(1.0, scipy.stats.t.ppf(0.975, n - 1) / n)
    assert (found.value, found.p_value) == (0, 1) and (found.low, found.high) == pytest.approx((-half, half))


def test_an_effect_of_shares_near_1_is_covered() -> None:
    """A main effect over eight cells, four of each sign, on the same prompts."""
    rng, contrast = np.random.default_rng(30), np.repeat([0.25, -0.25], 4)
    share = np.array([0.99, 0.98, 0.99, 0.97, 0.98, 0.98, 0.99, 0.99])
    hits, threshold = [], np.quantile(rng.random((200_000, 2)) @ [0.7, 0.3], share)
    for _ in range(500):
        luck = 0.7 * rng.random((64, 1)) + 0.3 * rng.random((64, 8))
        found = estimate_mean(luck < threshold, contrast, rate=True)
        hits.append(found.low <= share @ contrast <= found.high)
    assert np.mean(hits) >= 0.93


def test_equal_cells_do_not_differ() -> None:
    scores = np.repeat(np.random.default_rng(25).normal(size=(30, 1)), 2, axis=1)
    assert estimate_mean(scores, [1, -1]).p_value == 1
    same = jackknife(partial(mean_of, scores), 30).estimate([1, -1])
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_the_p_value_of_a_jackknifed_mean_is_that_of_the_paired_t_test() -> None:
    scores = np.random.default_rng(26).normal((0.0, 0.3), size=(40, 2))
    found = jackknife(partial(mean_of, scores), 40, groups=40).estimate([1, -1])
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(scores[:, 0], scores[:, 1]).pvalue, rel=1e-9)
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)


def test_a_few_prompts_that_differ_are_no_evidence() -> None:
    """Of 1,000 prompts four differ, all one way: random signs give that in one of eight cases."""
    scores = np.zeros((1000, 2))
    scores[:4, 0] = [0.9, 1.0, 1.1, 1.0]
    found = estimate_mean(scores, [1, -1])
    assert found.p_value is not None and found.p_value > 0.1 and found.low < 0 < found.high


def test_p_values_of_cells_that_do_not_differ_are_even() -> None:
    """Of two cells of one distribution on shared prompts, a share of about p has a p-value below p; both lie off the reference."""
    rng = np.random.default_rng(27)
    reference = FrechetReference(rng.normal(size=(400, 4)))
    means, sets = [], []
    for seed in range(200):
        shared = rng.normal(size=(60, 4))
        cells = [0.5 + 0.8 * shared + 0.6 * rng.normal(size=(60, 4)) for _ in range(2)]
        means.append(estimate_mean(np.stack([x[:, 0] for x in cells], axis=1), [1, -1]).p_value)
        distances = [reference.subset_distance(x) for x in cells]
        found = jackknife(lambda rows, of=distances: np.array([distance(rows) for distance in of]), 60, seed=seed)
        sets.append(found.estimate([1, -1]).p_value)
    for values in (means, sets):
        assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.045)
        assert np.mean(np.array(values) < 0.5) == pytest.approx(0.5, abs=0.11)


def test_a_difference_is_seen() -> None:
    rng = np.random.default_rng(28)
    common = rng.normal(size=(100, 1))
    scores = np.concatenate([common, common + 0.2 + 0.1 * rng.normal(size=(100, 1))], axis=1)
    found = estimate_mean(scores, [-1, 1])
    paired = scipy.stats.ttest_rel(scores[:, 1], scores[:, 0])
    assert found.p_value is not None and paired.pvalue <= found.p_value < 1e-20
    assert found.low == pytest.approx(paired.confidence_interval().low, rel=0.03)


def test_what_is_not_finite_cannot_be_compared() -> None:
    scores = np.ones((20, 2))
    for broken in (np.inf, 1e200, np.nan):
        scores[3, 0] = broken
        with pytest.raises(DdilError, match="not finite"):
            estimate_mean(scores, [1, -1])
    with pytest.raises(DdilError, match="cannot be compared; check the images"):
        jackknife(partial(mean_of, scores), 20).estimate([1, -1])
