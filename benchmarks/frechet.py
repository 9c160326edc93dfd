"""The Fréchet distance against SciPy's ``sqrtm``: seconds on the same features in the same run.

    python -m benchmarks.frechet [--dimensions 2048] [--samples 500 --samples 5000] [--csv FILE]

Both compute the distance from features [N, d] of two sets of N images, covariances included. The features decay like
those of a network: the k-th direction has variance 1/k. "faster" is the ratio of the times, "difference" the relative
difference of the two values, and "itself" our distance of a set to itself.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pandas as pd
import scipy.linalg

from benchmarks.printing import show
from ddil_eval.statistics import frechet_distance


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """Apply the textbook formula, with the matrix square root of the covariances' product."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of singular products
        root = scipy.linalg.sqrtm(a @ b)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Return the value and the seconds that it took."""
    started = time.perf_counter()
    value = function()
    return value, time.perf_counter() - started


def features(rng: np.random.Generator, count: int, dimensions: int, shift: float) -> np.ndarray:
    scale = 1 / np.sqrt(np.arange(1, dimensions + 1))
    return rng.normal(size=(count, dimensions)) * scale + shift * scale


@click.command()
@click.option("--dimensions", default=2048, show_default=True)
@click.option("--samples", multiple=True, type=int, default=(500, 5000), show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(dimensions: int, samples: tuple[int, ...], csv_path: Path | None) -> None:
    rng = np.random.default_rng(0)
    warm = features(rng, 64, 64, 0.0)
    by_sqrtm(warm, warm), frechet_distance(warm, warm)
    rows = []
    for count in samples:
        x, y = features(rng, count, dimensions, 0.1), features(rng, count, dimensions, 0.0)
        ours, seconds = timed(lambda x=x, y=y: frechet_distance(x, y))
        theirs, sqrtm_seconds = timed(lambda x=x, y=y: by_sqrtm(x, y))
        rows.append(
            {
                "d": dimensions,
                "N": count,
                "ours_s": seconds,
                "sqrtm_s": sqrtm_seconds,
                "faster": sqrtm_seconds / seconds,
                "value": ours,
                "difference": abs(ours - theirs) / abs(theirs),
                "itself": frechet_distance(x, x),
            }
        )
    frame = pd.DataFrame(rows)
    show(frame, csv_path, ".4g")


if __name__ == "__main__":
    main()
