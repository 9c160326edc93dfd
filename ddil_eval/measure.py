"""Pictures to features, once for every distinct picture, and features to the estimates of cells and contrasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ddil_core.data import DataSet
from ddil_core.errors import DdilError, WrongCommand
from ddil_core.progress import progress
from ddil_eval.metrics import METRICS, Extractor
from ddil_eval.statistics import Estimate, FrechetReference, bootstrap_mean, jackknife
from ddil_eval.store import replacing

Arrays = dict[str, np.ndarray]
Features = Arrays
"""For each metric the features [N, d] of N pictures."""


class Extractors:
    """The extractors of the chosen metrics, opened once.

    Raises:
        WrongCommand: a metric that is not known.
        DdilError: a metric lacks its weights; said before any picture is made.
    """

    def __init__(self, names: Sequence[str], device: str) -> None:
        unknown = [name for name in names if name not in METRICS]
        if unknown:
            raise WrongCommand(f"the metric {unknown[0]!r} is not known; it may be one of {', '.join(METRICS)}")
        absent = [problem for name in names if (problem := METRICS[name].missing())]
        if absent:
            raise DdilError(absent[0])
        self.open: dict[str, Extractor] = {name: METRICS[name].open(device) for name in names}

    def __call__(self, images: np.ndarray, captions: list[str]) -> Features:
        return {name: extract(images, captions) for name, extract in self.open.items()}

    def reference(self, data: DataSet, count: int) -> Features:
        """Features of the evaluation split's own pictures, for the metrics that compare sets."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.open if METRICS[name].kind == "set"}
        if not parts:
            return {}
        with progress("reference pictures", total=count) as advance:
            for images in data.pictures(count):
                for name in parts:
                    parts[name].append(self.open[name](images, [""] * len(images)))
                advance(len(images))
        return {name: np.concatenate(features) for name, features in parts.items()}


def kept(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a finished chunk; where it is not there yet, what ``make`` gives, kept for the next time.

    Raises:
        DdilError: the chunk is damaged.
    """
    if not path.is_file():
        arrays = make()
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stub takes every name for allow_pickle
        return arrays
    try:
        with np.load(path) as held:
            return {name: held[name] for name in held.files}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DdilError(f"the finished chunk {path} is damaged; delete the file to make the chunk again") from error


def concatenate(parts: Sequence[Features]) -> Features:
    """Features of several batches, one after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclass(frozen=True)
class Cells:
    """Cells measured on the same prompts: for each its rows [prompts] of the shared features."""

    features: Features
    rows: Mapping[str, np.ndarray]
    reference: Features
    seed: int = 0

    def estimates(self, contrasts: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
        """For each contrast (weights over the cells) and metric, the estimate. Prompts are resampled for all cells together."""
        found: dict[str, dict[str, Estimate]] = {name: {} for name in contrasts}
        for metric, features in self.features.items():
            if METRICS[metric].kind == "mean":
                scores = np.stack([features[rows, 0] for rows in self.rows.values()], axis=1)
                for name, weights in contrasts.items():
                    found[name][metric] = bootstrap_mean(scores, weights, self.seed)
                continue
            spread = self._jackknife(features, self.reference[metric])
            for name, weights in contrasts.items():
                lowest = 0.0 if np.count_nonzero(weights) == 1 else -np.inf
                found[name][metric] = spread.estimate(weights, lowest=lowest)
        return found

    def _jackknife(self, features: np.ndarray, reference: np.ndarray):  # type: ignore[no-untyped-def]
        prepared = FrechetReference(reference)
        distances = [prepared.subset_distance(features[rows]) for rows in self.rows.values()]
        prompts = len(next(iter(self.rows.values())))
        with progress("intervals", total=min(20, prompts) + 1) as advance:

            def value_of(kept: np.ndarray) -> np.ndarray:
                values = np.array([distance(kept) for distance in distances])
                advance()
                return values

            return jackknife(value_of, prompts, seed=self.seed)

    def single(self) -> dict[str, np.ndarray]:
        """The contrasts that name each cell by itself."""
        return dict(zip(self.rows, np.eye(len(self.rows)), strict=True))
