"""The host memory of measuring N images with a cheap extractor: images → features on disk → intervals → record.

    python -m benchmarks.feature_memory [--num-images 1000 --num-images 30000] [--csv FILE]

Each N runs in its own process; "peak" is the largest resident set of this process. Images are generated batch by
batch, as a model would, 256 × 256. The extractor returns means over 4 × 4 fields, 48 numbers, and runs beside the
generation. The row "engine" is what ``ddil eval`` does, with a Fréchet distance only. "all statistics" adds KID, FID∞
and precision to coverage.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import pandas as pd

from benchmarks.printing import show
from ddil_core.data.base import Prompt
from ddil_core.data.shapes import ShapesData
from ddil_eval.experiments.engine import measure_systems as compare
from ddil_eval.experiments.image_batches import ImageBatch
from ddil_eval.experiments.image_sources import ImageOrigin, ImageSource
from ddil_eval.experiments.rows import Setting, System
from ddil_eval.features.extraction import Extractors, map_ahead
from ddil_eval.features.recipes import load_recipe
from ddil_eval.features.storage import gather_features
from ddil_eval.metrics import METRICS, Metric, Network
from ddil_eval.statistics import FrechetInfinity, FrechetReference, group_labels
from ddil_eval.statistics.kernels import KernelDistance
from ddil_eval.statistics.neighbours import Neighbours

BATCH = 50


@dataclass(frozen=True)
class Drawn:
    """Batches of images uint8 [50, 256, 256, 3], all different."""

    count: int
    number: int = 1
    per_batch: int = BATCH

    def __len__(self) -> int:
        return self.count // BATCH

    def __getitem__(self, index: int) -> ImageBatch:
        if index >= len(self):
            raise IndexError(index)
        fields = np.random.default_rng(index).integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
        prompts = [Prompt(str(place), "") for place in range(index * BATCH, (index + 1) * BATCH)]
        images = fields.repeat(8, axis=1).repeat(8, axis=2)
        return ImageBatch(index * BATCH, lambda: images, prompts)


def extract(images: np.ndarray) -> np.ndarray:
    side = images.shape[1] // 4
    fields = images.reshape(len(images), 4, side, 4, side, 3)
    return fields.mean(axis=(2, 4), dtype=np.float64).reshape(len(images), 48).astype(np.float32)


NETWORK = Network("fields", "nothing", lambda device: lambda images, captions: extract(images))
FIELDS = Metric("fd_fields", "Fréchet distance of means over fields", "lower", "set", NETWORK, FrechetReference)


def engine(count: int, folder: Path) -> None:
    """Measure one row of a comparison, from batches to its record."""
    METRICS.add(FIELDS)
    recipe = load_recipe("shapes")
    data = {"reference": "shapes", "prompt_ids_sha256": "", "captions_sha256": ""}
    setting = Setting({}, frozenset(), recipe, ShapesData(), 1000, data, count, BATCH, 0, "cpu")
    row = System("drawn", lambda: ImageSource(ImageOrigin("drawn"), Drawn(count)))
    compare([row], [], Extractors([FIELDS.name], "cpu", recipe), setting, folder)


def statistics(count: int, folder: Path) -> None:
    """Compute every kind of statistic of a set, on features on disk."""
    parts = ({"fields": features} for features in map_ahead(Drawn(count), lambda batch: extract(batch.images)))
    features = gather_features(parts, count, folder)["fields"]
    reference = np.random.default_rng(1).normal(128, 5, (1000, 48)).astype(np.float32)
    for statistic in (FrechetReference, FrechetInfinity, KernelDistance, Neighbours):
        statistic(reference).spread(features, group_labels(count))


def measure(what: str, count: int) -> tuple[float, float]:
    """Return MiB at the peak, and seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        MEASURED[what](count, Path(folder))
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, time.perf_counter() - started


MEASURED = {"engine": engine, "all statistics": statistics}


@click.command()
@click.option("--num-images", "counts", multiple=True, type=int, default=(1000, 30000), show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(counts: tuple[int, ...], csv_path: Path | None) -> None:
    rows = []
    for what in MEASURED:
        for count in counts:
            with get_context("spawn").Pool(1) as process:
                peak, seconds = process.apply(measure, (what, count))
            rows.append({"what": what, "N": count, "peak_MiB": peak, "seconds": seconds})
    frame = pd.DataFrame(rows)
    frame["grown_MiB"] = frame.peak_MiB - frame.groupby("what").peak_MiB.transform("first")
    show(frame, csv_path, ".1f")


if __name__ == "__main__":
    main()
