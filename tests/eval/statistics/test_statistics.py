"""Fréchet distances against closed forms and other packages; intervals and p-values against what they claim."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from ddil_core.support.errors import DdilError
from ddil_eval.statistics import (
    Estimate,
    FrechetInfinity,
    FrechetReference,
    Jackknife,
    Moments,
    Spread,
    estimate_mean,
    frechet_distance,
    group_labels,
)
from ddil_eval.statistics.jackknife import pseudovalues
from tests.jackknife import jackknife, single_cells


def exact_moments(rng: np.random.Generator, n: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """``n`` samples whose sample mean and unbiased covariance are exactly these."""
    white = rng.normal(size=(n, len(mean)))
    white -= white.mean(axis=0)
    white = np.linalg.qr(white)[0] * np.sqrt(n - 1)
    return mean + white @ np.linalg.cholesky(covariance).T


def random_covariance(rng: np.random.Generator, d: int) -> np.ndarray:
    root = rng.normal(size=(d, d))
    return root @ root.T / d + 0.1 * np.eye(d)


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook formula, which this project does not use."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(a @ b))
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root))


def test_distance_of_commuting_gaussians_has_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0.1, 3.0, 6), rng.uniform(0.1, 3.0, 6)
    mean = rng.normal(size=6)
    x = exact_moments(rng, 50, mean, basis @ np.diag(a) @ basis.T)
    y = exact_moments(rng, 70, np.zeros(6), basis @ np.diag(b) @ basis.T)
    assert frechet_distance(x, y) == pytest.approx(mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)


def test_distance_of_rank_one_sets_has_its_closed_form() -> None:
    # Σ = s² u uᵀ: tr (Σx Σy)^½ = s_x s_y |u · v|, in more dimensions than there are samples.
    rng = np.random.default_rng(1)
    u, v = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, 40)))
    x, y = np.outer([-1.0, 0.0, 1.0], u), np.outer([-2.0, 2.0], v)
    assert frechet_distance(x, y) == pytest.approx(1 + 8 - 2 * np.sqrt(8) * abs(u @ v), rel=1e-12)


@pytest.mark.parametrize("n", [9, 300])
def test_distance_equals_the_matrix_square_root_of_scipy(n: int) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8))
    y = rng.normal(size=(200, 8)) + 0.5
    assert frechet_distance(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-8)


class Flat(torch.nn.Module):
    """Pictures [B, C, H, W] as their own features."""

    num_features = 12

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.flatten(1)


@pytest.mark.parametrize("n", [40, 300])
def test_distance_is_that_of_torchmetrics_in_float64(n: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    rng = np.random.default_rng(20)
    x, y = rng.normal(size=(n, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(200, 12))
    theirs = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    for features, real in ((x, False), (y, True)):
        theirs.update(torch.from_numpy(features.reshape(-1, 3, 2, 2)), real=real)
    assert frechet_distance(x, y) == pytest.approx(float(theirs.compute()), rel=1e-8)


@pytest.mark.parametrize("n", [40, 300])
def test_distance_is_that_of_torch_fidelity(n: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(21)
    x, y = rng.normal(size=(n, 12)) + 0.3, rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    statistics = [fid_features_to_statistics(torch.from_numpy(features)) for features in (x, y)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 3), (2, 40, 30), (5, 5, 64), (64, 64, 64), (65, 3, 64)])
def test_distance_is_never_negative_complex_or_nan(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(22)
    x, y = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)
    flat = np.full((n, d), 0.1, dtype=np.float32)
    for first, second in ((x, y), (x, x), (flat, flat), (flat, y), (y, flat), (1e-8 * x, 1e-8 * x), (1e4 * x, 1e4 * x)):
        found = frechet_distance(first, second)
        assert isinstance(found, float) and np.isfinite(found) and found >= 0


def test_few_samples_and_eigen_decomposition_agree() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 12)), rng.normal(size=(40, 12)) @ np.diag(rng.uniform(0.5, 2, 12))
    padding = np.zeros((30, 50)), np.zeros((40, 50))
    wide = [np.hstack([features, zeros]) for features, zeros in zip((x, y), padding, strict=True)]
    rotation = np.linalg.qr(rng.normal(size=(62, 62)))[0]
    assert wide[0].shape[0] < wide[0].shape[1]
    assert frechet_distance(wide[0] @ rotation, wide[1] @ rotation) == pytest.approx(frechet_distance(x, y), rel=1e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 64), (20, 300, 64), (300, 200, 64), (2, 2, 5), (65, 64, 64)])
def test_distance_is_symmetric_and_zero_only_to_itself(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(n, d)), 1.3 * rng.normal(size=(m, d))
    trace = np.var(x, axis=0, ddof=1).sum()
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)
    assert frechet_distance(x, y) > 0.01 * trace
    assert 0 <= frechet_distance(x, x) <= 1e-10 * trace
    assert 0 <= frechet_distance(x, rng.permutation(x)) <= 1e-10 * trace


def test_distance_follows_its_scale_and_shift() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 10)), rng.normal(size=(50, 10))
    assert frechet_distance(3e4 * x, 3e4 * y) == pytest.approx(9e8 * frechet_distance(x, y), rel=1e-10)
    assert frechet_distance(x + 100, y + 100) == pytest.approx(frechet_distance(x, y), rel=1e-9)


@pytest.mark.parametrize("d", [3, 2000])
def test_constant_features_leave_only_the_means(d: int) -> None:
    x, y = np.full((10, d), 2.0), np.full((4, d), 0.5)
    assert frechet_distance(x, y) == pytest.approx(2.25 * d, rel=1e-12)
    assert frechet_distance(x, x) == 0.0


def test_float32_features_are_measured_in_float64() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(2, 30, 5)).astype(np.float32)
    assert frechet_distance(x, y) == frechet_distance(x.astype(np.float64), y.astype(np.float64))


@pytest.mark.parametrize(("n", "m", "d"), [(60, 40, 8), (60, 30, 100), (60, 200, 100), (60, 500, 50)])
def test_a_subset_is_measured_as_if_it_were_alone(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(7)
    x, reference = rng.normal(size=(n, d)) + 0.1, FrechetReference(1.2 * rng.normal(size=(m, d)))
    rows = np.sort(rng.permutation(n)[: n - 7])
    assert reference.subset_distance(x)(rows) == pytest.approx(reference.distance(x[rows]), rel=1e-10)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (np.zeros((1, 4)), "at least two images"),
        (np.zeros(4), "at least two images"),
        (np.full((5, 4), np.nan), "not finite"),
        (np.zeros((5, 3)), "features of width 3 cannot be compared with a reference of width 4"),
    ],
)
def test_features_that_cannot_be_measured_are_refused(features: np.ndarray, words: str) -> None:
    with pytest.raises(DdilError, match=words):
        frechet_distance(features, np.eye(4))


def test_an_interval_contains_its_point() -> None:
    assert Estimate(1.0, 1.0, 1.0, 2).value == 1.0
    for low, high in [(1.1, 2.0), (0.0, 0.9), (np.nan, 2.0)]:
        with pytest.raises(ValueError, match="does not contain its value"):
            Estimate(1.0, low, high, 2)


def mean_of(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return values[rows].mean(axis=0)


@pytest.mark.parametrize("groups", [10, 50, 1000])
def test_jackknife_of_a_mean_has_its_closed_form(groups: int) -> None:
    values = np.random.default_rng(8).normal((3.0, 1.0), size=(50, 2))
    measured = jackknife(partial(mean_of, values), 50, groups=groups).estimate([1, -2])
    scores = values @ [1, -2]
    assert measured.value == pytest.approx(scores.mean(), rel=1e-12)
    if groups >= 50:  # delete-one: the standard error of the mean, and Student's t with 49 degrees of freedom
        half = scipy.stats.t.ppf(0.975, 49) * scores.std(ddof=1) / np.sqrt(50)
        assert measured.high - measured.value == pytest.approx(half, rel=1e-10)
        assert measured.value - measured.low == pytest.approx(half, rel=1e-10)


def test_unequal_groups_add_no_spread_to_a_pure_bias() -> None:
    # A statistic 5 + 3/n has no spread: pseudovalues see none, though groups of 6 and 7 leave different sizes.
    measured = jackknife(lambda rows: np.array([5 + 3 / len(rows)]), 128, groups=20).estimate([1])
    assert measured.high - measured.low < 1e-10


def test_a_value_that_no_group_changes_has_an_unknown_spread() -> None:
    """A share of modes found, above a threshold, hardly ever changes with one group; that is no proof of a difference."""
    cells = jackknife(lambda rows: np.array([1.0, 0.975]), 100)
    for contrast in ([1, -1], [1, 0]):
        assert cells.estimate(contrast).note == "no group of prompts changes the value, so that its spread is not known"
    assert cells.estimate([1, 0], rate=True, highest=1.0).note is None  # its interval counts one more sample
    equal = jackknife(lambda rows: np.array([1.0, 1.0]), 100).estimate([1, -1])
    assert (equal.value, equal.p_value, equal.note) == (0, 1, None)


def test_jackknife_depends_on_its_seed_and_not_on_the_order_of_cells() -> None:
    values = np.random.default_rng(9).normal(size=(40, 3))
    first = jackknife(partial(mean_of, values), 40, seed=1)
    again = jackknife(partial(mean_of, values[:, ::-1]), 40, seed=1)
    other = jackknife(partial(mean_of, values), 40, seed=2)
    assert single_cells(first) == single_cells(again)[::-1]
    assert single_cells(first)[0] != single_cells(other)[0]
    assert single_cells(first)[0].value == single_cells(other)[0].value


def test_the_interval_of_a_distance_can_be_bounded_at_zero() -> None:
    rng = np.random.default_rng(10)
    distance = FrechetReference(rng.normal(size=(500, 1))).subset_distance(rng.normal(size=(40, 1)))
    measured = jackknife(lambda rows: np.array([distance(rows)]), 40)
    assert measured.estimate([1]).low < 0
    assert measured.estimate([1], lowest=0.0).low == 0
    assert measured.estimate([1], lowest=0.0).n == 40


def test_intervals_refuse_too_few_prompts() -> None:
    with pytest.raises(DdilError, match="3 prompts are too few for a jackknife interval"):
        jackknife(lambda rows: np.zeros(1), 3)
    with pytest.raises(DdilError, match="1 prompt is too few for an interval"):
        estimate_mean(np.zeros((1, 1)), [1])
    with pytest.raises(DdilError, match="not finite"):
        estimate_mean(np.full((5, 1), np.inf), [1])


@pytest.mark.parametrize(("n", "d"), [(120, 6), (40, 48)])
def test_jackknife_of_frechet_distances_covers(n: int, d: int) -> None:
    """Cells and their difference, with more and with fewer samples than dimensions; the truth is the mean at this n."""
    rng = np.random.default_rng(11)
    reference = FrechetReference(rng.normal(size=(1000, d)))
    mixing = np.eye(d) + 0.2 * rng.normal(size=(d, d)) / np.sqrt(d)

    def draw() -> list[np.ndarray]:
        shared, own = rng.normal(size=(2, n, d))
        return [shared @ mixing + 0.3, 1.1 * (0.8 * shared + 0.6 * own)]

    contrasts = np.array([[1, 0], [0, 1], [1, -1]])
    truth = contrasts @ np.mean([[reference.distance(x) for x in draw()] for _ in range(400)], axis=0)
    hits = []
    for trial in range(200):
        cells = [reference.subset_distance(x) for x in draw()]
        measured = jackknife(lambda rows, cells=cells: np.array([cell(rows) for cell in cells]), n, seed=trial)
        intervals = [measured.estimate(contrast) for contrast in contrasts]
        hits.append([e.low <= value <= e.high for e, value in zip(intervals, truth, strict=True)])
    assert np.mean(hits, axis=0) == pytest.approx(0.95, abs=0.05)


def test_why_a_frechet_distance_is_not_bootstrapped() -> None:
    rng = np.random.default_rng(12)
    x, reference = rng.normal(size=(300, 32)), FrechetReference(rng.normal(size=(300, 32)))
    resampled = [reference.distance(x[rng.integers(0, 300, 300)]) for _ in range(50)]
    assert min(resampled) > reference.distance(x)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_the_interval_of_a_share_covers_near_its_bounds(share: float) -> None:
    rng = np.random.default_rng(19)
    hits, widths = [], []
    for _ in range(400):
        measured = estimate_mean(rng.random((100, 1)) < share, [1], rate=True)
        assert 0 <= measured.low <= measured.value <= measured.high <= 1
        hits.append(measured.low <= share <= measured.high)
        widths.append(measured.high - measured.low)
    assert np.mean(hits) >= 0.92 and min(widths) > 0.03
    assert estimate_mean(np.ones((256, 1)), [1], rate=True).low == pytest.approx(256 / (256 + 1.96**2), abs=1e-5)


SCORES: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "log-normal": (lambda rng, size: rng.lognormal(size=size), float(np.exp(0.5))),
    "near 1, skewed to the left": (lambda rng, size: rng.beta(20, 2, size=size), 20 / 22),
    "heavy tails": (lambda rng, size: rng.standard_t(3, size=size), 0.0),
}
"""Scores of prompts, and their mean."""


@pytest.mark.parametrize("n", [8, 16, 20, 64])
@pytest.mark.parametrize("name", SCORES)
def test_the_interval_of_a_mean_covers_with_few_prompts(name: str, n: int) -> None:
    """The share of 1,500 trials has a standard error of 0.006; a bootstrap (BCa) of 16 exponential scores holds 0.90."""
    draw, truth = SCORES[name]
    found = [estimate_mean(scores[:, None], [1]) for scores in draw(np.random.default_rng(13), (1500, n))]
    least = {"log-normal": {8: 0.875, 16: 0.90, 20: 0.905, 64: 0.92}}.get(name, {8: 0.92}).get(n, 0.93)
    assert np.mean([e.low <= truth <= e.high for e in found]) >= least


def test_the_interval_of_many_even_scores_is_student_s() -> None:
    scores = np.random.default_rng(14).normal((0.0, 5.0), size=(4000, 2))
    measured = estimate_mean(scores, [0, 1])
    t = scipy.stats.ttest_1samp(scores[:, 1], 0).confidence_interval()
    assert (measured.low, measured.high) == pytest.approx((t.low, t.high), rel=2e-3)
    assert measured.value == pytest.approx(scores[:, 1].mean(), rel=1e-12)
    assert measured == estimate_mean(scores, [0, 1])
    turned = estimate_mean(scores[::-1], [0, 1])
    assert (turned.low, turned.high) == pytest.approx((measured.low, measured.high), rel=1e-12)


def test_the_interval_of_a_mean_leans_with_the_skew_of_its_scores() -> None:
    """Hall's interval in closed form: the t that has the transformed value ±t of Student's; the bound of a metric cuts it."""
    scores = np.random.default_rng(15).exponential(size=(30, 1))
    measured = estimate_mean(scores, [1], lowest=0.0)
    assert measured.high - measured.value > 1.2 * (measured.value - measured.low) > 0
    skew = scipy.stats.skew(scores[:, 0]) / np.sqrt(30)
    t = (measured.value - measured.high) / (scores.std(ddof=1) / np.sqrt(30))
    transformed = t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6
    assert transformed == pytest.approx(scipy.stats.t.ppf(0.025, 29), rel=1e-9)
    assert estimate_mean(np.array([[0.0], [0.0], [5.0]]), [1], lowest=0.0).low == 0
    assert estimate_mean(np.ones((9, 1)), [1]) == Estimate(1.0, 1.0, 1.0, 9)


# FID∞


def population(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    """The moments of so many samples that they are the population's."""
    return Moments(10**12, mean, scatter=covariance * (10**12 - 1))


def test_the_limit_is_that_of_a_line_in_one_over_n() -> None:
    """Of what is exactly L + c / n it finds L, also where groups are not equal."""
    rng = np.random.default_rng(15)
    x, infinity = rng.normal(size=(403, 6)), FrechetInfinity(rng.normal(size=(500, 6)))

    class Line(FrechetReference):
        def spread(self, features: np.ndarray, labels: np.ndarray) -> Spread:
            values = np.array([2 + 30 / len(labels)])
            left = len(labels) - np.bincount(labels)
            return Spread(values, pseudovalues(values, (2 + 30 / left)[:, None], labels))

    infinity.reference = Line(rng.normal(size=(500, 6)))
    assert infinity.values(x)[0] == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("n", [30, 120, 403])
def test_the_limit_does_not_move_with_the_seed_or_the_order_of_the_pictures(n: int) -> None:
    rng = np.random.default_rng(16)
    x, infinity = 1.1 * rng.normal(size=(n, 8)).astype(np.float32), FrechetInfinity(rng.normal(size=(500, 8)))
    value = infinity.values(x)[0]
    for seed in range(4):
        assert infinity.values(rng.permutation(x))[0] == pytest.approx(value, rel=1e-9)
        assert infinity.spread(x, group_labels(n, seed)).values[0] == value
        measured = limit_of(infinity, x, seed)
        assert measured.low < measured.value < measured.high or measured.value == measured.low == 0
    equal = np.repeat(x[:2], n // 2, axis=0)
    assert np.isfinite(infinity.values(equal)).all()


def limit_of(infinity: FrechetInfinity, x: np.ndarray, seed: int = 0) -> Estimate:
    labels = group_labels(len(x), seed)
    spread = infinity.spread(x, labels)
    return Jackknife(spread.values, spread.pseudovalues, np.bincount(labels), notes=(spread.note,)).estimate(
        [1], lowest=0.0
    )


def test_the_limit_has_no_bias_that_a_distance_has() -> None:
    d, n = 16, 600
    covariance = np.diag(np.linspace(0.5, 2, d))
    reference = population(np.zeros(d), np.eye(d))
    truth = frechet_of(reference, population(np.full(d, 0.1), covariance))
    rng = np.random.default_rng(16)
    samples = [rng.normal(size=(n, d)) * np.sqrt(np.diag(covariance)) + 0.1 for _ in range(40)]
    distances = np.array([FrechetReference(reference).distance(x) for x in samples])
    limits = np.array([FrechetInfinity(reference).values(x)[0] for x in samples])
    assert distances.mean() - truth > 5 * distances.std() / np.sqrt(40)
    assert abs(limits.mean() - truth) < 3 * limits.std() / np.sqrt(40)


def frechet_of(x: Moments, y: Moments) -> float:
    return FrechetReference(y).distance(x)


@pytest.mark.parametrize(("ratio", "least"), [(2.5, 0.65), (4.9, 0.88), (15, 0.88)])
def test_the_limit_s_interval_covers_the_population_s_distance(ratio: float, least: float) -> None:
    """By the pictures to a dimension; the share of 60 trials has a standard error of 0.03. docs/metrics.md has more trials."""
    d = 12
    reference, shifted = population(np.zeros(d), np.eye(d)), population(np.full(d, 0.2), 1.5 * np.eye(d))
    truth, rng, infinity = frechet_of(reference, shifted), np.random.default_rng(17), FrechetInfinity(reference)
    found = [
        limit_of(infinity, np.sqrt(1.5) * rng.normal(size=(round(ratio * d), d)) + 0.2, seed) for seed in range(60)
    ]
    assert all(0 <= e.low <= e.value <= e.high for e in found)
    assert np.mean([e.low <= truth <= e.high for e in found]) >= least
    assert all((e.note is not None) == (ratio < 5) for e in found)


def test_a_limit_of_too_few_pictures_says_so() -> None:
    rng = np.random.default_rng(18)
    infinity = FrechetInfinity(rng.normal(size=(300, 8)))
    assert limit_of(infinity, rng.normal(size=(40, 8))).note is None
    assert limit_of(infinity, rng.normal(size=(39, 8))).note == (
        "a limit from 39 images is not reliable, and is not marked as better or worse: it needs 5 for each of the 8 "
        "features, 40"
    )


@pytest.mark.parametrize(("n", "d"), [(4, 6), (4, 2), (30, 200)])
def test_the_limit_of_few_samples_is_a_number(n: int, d: int) -> None:
    rng = np.random.default_rng(18)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(10, d))
    for first, second in ((x, y), (x, x), (np.ones((n, d)), np.ones((10, d)))):
        spread = FrechetInfinity(second).spread(first, group_labels(n))
        assert np.isfinite(spread.values).all() and spread.values[0] >= 0 and np.isfinite(spread.pseudovalues).all()
