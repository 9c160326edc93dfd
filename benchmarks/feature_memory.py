"""Host memory of measuring N pictures with a cheap extractor: pictures → features on disk → FD, KID, PRDC with intervals.

    python -m benchmarks.feature_memory [--pictures 1000 --pictures 30000] [--csv FILE]

Each N runs in a process of its own; "peak" is that process's largest resident set. Pictures are drawn batch by batch as a model
would draw them, 256 × 256; the extractor takes means over 4 × 4 fields, 48 numbers. Extraction runs beside the drawing.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import pandas as pd

from benchmarks.printing import show
from ddil_eval.features import Features, gathered, overlapped
from ddil_eval.statistics import FrechetInfinity, FrechetReference, group_labels
from ddil_eval.statistics.kernels import KernelDistance
from ddil_eval.statistics.neighbours import Neighbours

BATCH = 50


def pictures(count: int) -> Iterator[np.ndarray]:
    """uint8 [50, 256, 256, 3] in batches, all different."""
    for start in range(0, count, BATCH):
        rng = np.random.default_rng(start)
        fields = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
        yield fields.repeat(8, axis=1).repeat(8, axis=2)


def extract(images: np.ndarray) -> Features:
    fields = images.reshape(len(images), 4, 64, 4, 64, 3)
    return {"fields": fields.mean(axis=(2, 4), dtype=np.float64).reshape(len(images), 48).astype(np.float32)}


def measure(count: int, statistics: bool) -> tuple[float, float]:
    """MiB at the peak, and seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        features = gathered(overlapped(pictures(count), extract), count, Path(folder))["fields"]
        reference = np.random.default_rng(1).normal(128, 5, (1000, 48)).astype(np.float32)
        if statistics:
            labels = group_labels(count)
            for statistic in (FrechetReference, FrechetInfinity, KernelDistance, Neighbours):
                statistic(reference).spread(features, labels)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, time.perf_counter() - started


@click.command()
@click.option("--pictures", "counts", multiple=True, type=int, default=(1000, 30000), show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(counts: tuple[int, ...], csv_path: Path | None) -> None:
    rows = []
    for statistics in (False, True):
        for count in counts:
            with get_context("spawn").Pool(1) as process:
                peak, seconds = process.apply(measure, (count, statistics))
            what = "features, all statistics" if statistics else "features"
            rows.append({"what": what, "N": count, "peak_MiB": peak, "seconds": seconds})
    frame = pd.DataFrame(rows)
    frame["grown_MiB"] = frame.peak_MiB - frame.groupby("what").peak_MiB.transform("first")
    show(frame, csv_path, ".1f")


if __name__ == "__main__":
    main()
