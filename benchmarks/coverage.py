"""How often 95 % intervals contain the truth, by simulation: means, differences of shares, and FID's limit.

Run ``python -m benchmarks.coverage``; it takes a few minutes on one core. Each share has a standard error of about
√(0.05 · 0.95 / trials).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ddil_eval.statistics import (
    Estimate,
    FrechetInfinity,
    FrechetReference,
    Jackknife,
    Moments,
    estimate_mean,
    group_labels,
)

Rng = np.random.Generator
Draw = Callable[[Rng, tuple[int, ...]], np.ndarray]

SCORES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "uniform": (lambda rng, size: rng.random(size=size), 0.5),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "log-normal": (lambda rng, size: rng.lognormal(size=size), float(np.exp(0.5))),
    "beta (20, 2)": (lambda rng, size: rng.beta(20, 2, size=size), 20 / 22),
    "beta (8, 0.5)": (lambda rng, size: rng.beta(8, 0.5, size=size), 8 / 8.5),
    "Student's, 3 degrees": (lambda rng, size: rng.standard_t(3, size=size), 0.0),
}
SHARES = ((0.5, 0.5), (0.9, 0.9), (0.97, 0.97), (0.99, 0.99), (0.5, 0.6), (0.97, 0.9), (0.99, 0.97), (0.99, 0.5))


def held(estimates: Iterable[Estimate], truth: float) -> float:
    """Return the share of intervals that contain the truth."""
    return float(np.mean([found.low - 1e-12 <= truth <= found.high + 1e-12 for found in estimates]))


def means(rng: Rng, trials: int = 3000) -> None:
    """Return the coverage of means for one cell."""
    numbers = (5, 8, 12, 16, 20, 64, 256)
    print("mean of scores, by the number of prompts:", *numbers)
    for name, (draw, truth) in SCORES.items():
        rows = [held((estimate_mean(x[:, None], [1]) for x in draw(rng, (trials, n))), truth) for n in numbers]
        print(f"  {name:22s}", *(f"{row:.3f}" for row in rows))


def shares(rng: Rng, trials: int = 2000) -> None:
    """Return the coverage of a difference of two shares of the same prompts, independent to fully correlated."""
    for n in (16, 64, 256, 1000):
        found = {}
        for a, b in SHARES:
            for alike in (0.0, 0.9):
                both = a * b + alike * (min(a, b) - a * b)
                chances = [both, a - both, b - both, 1 - a - b + both]
                kinds = rng.choice(4, size=(trials, n), p=chances)
                right = np.stack([kinds < 2, (kinds == 0) | (kinds == 2)], axis=-1)
                found[a, b, alike] = held((estimate_mean(x, [1, -1], rate=True) for x in right), a - b)
        least = min(found, key=lambda place: found[place])
        mean = float(np.mean(list(found.values())))
        print(f"difference of shares, {n:4d} prompts: mean {mean:.3f}, least {found[least]:.3f} at {least}")


def limits(rng: Rng, trials: int = 200) -> None:
    """Return the coverage of FID's limit by images for each dimension, with a flat and a falling spectrum."""
    for d in (16, 64):
        for name, spectrum in (("flat", np.ones(d)), ("1/k", 1 / np.arange(1, d + 1))):
            reference = population(np.zeros(d), spectrum)
            scale, mean = 1.2 * (1 + 0.3 * rng.random(d)) * spectrum, 0.4 * np.sqrt(spectrum)
            truth, infinity = FrechetReference(reference).distance(population(mean, scale)), FrechetInfinity(reference)
            rows = []
            for ratio in (2.4, 4.9, 15):
                n = round(ratio * d)
                x = rng.normal(size=(trials, n, d)) * np.sqrt(scale) + mean
                rows.append(held((limit(infinity, one, seed) for seed, one in enumerate(x)), truth))
            print(
                f"FID's limit, {d} dimensions, {name} spectrum, 2.4, 4.9, 15 images each:",
                *(f"{r:.2f}" for r in rows),
            )


def limit(infinity: FrechetInfinity, features: np.ndarray, seed: int) -> Estimate:
    """Return the limit of features [n, d] with its interval."""
    labels = group_labels(len(features), seed)
    spread = infinity.spread(features, labels)
    return Jackknife(spread.values, spread.pseudovalues, np.bincount(labels)).estimate(np.ones(1), lowest=0.0)


def population(mean: np.ndarray, variances: np.ndarray) -> Moments:
    """Return moments of so many samples that they equal the population's."""
    return Moments(10**12, mean, scatter=np.diag(variances) * (10**12 - 1))


if __name__ == "__main__":
    for part in (means, shares, limits):
        part(np.random.default_rng(0))
