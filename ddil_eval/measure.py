"""Pictures to features, once for every distinct picture, and features to the estimates of cells and contrasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.dataset import DataSet
from ddil_core.errors import DdilError, WrongCommand
from ddil_core.files import replacing
from ddil_core.progress import progress
from ddil_eval.features import Arrays, Features, gathered
from ddil_eval.metrics import METRICS, Extractor, Metric, Network
from ddil_eval.references import kept_reference
from ddil_eval.statistics import Estimate, Jackknife, Statistic, estimate_mean, group_labels
from ddil_eval.statistics.moments import blocks


class Extractors:
    """The networks of the chosen metrics, each opened once; features are held under the network's name.

    ``prefix`` is what a recipe puts before captions ("A photo depicts "), for the networks that read it.

    Raises:
        WrongCommand: a metric that is not known.
        DdilError: a metric lacks its weights; said before any picture is made.
    """

    def __init__(self, names: Sequence[str], device: str, *, prefix: str = "") -> None:
        unknown = [name for name in names if name not in METRICS]
        if unknown:
            raise WrongCommand(f"the metric {unknown[0]!r} is not known; it may be one of {', '.join(METRICS)}")
        self.metrics = tuple(dict.fromkeys(names))
        rows = [METRICS[name] for name in self.metrics]
        absent = [f"{row.name}: {problem}" for row in rows if (problem := row.missing())]
        if absent:
            raise DdilError(absent[0])
        self.prefix = prefix
        self.networks: dict[str, Network] = {row.network.name: row.network for row in rows}
        self.open: dict[str, Extractor] = {name: network.open_on(device) for name, network in self.networks.items()}
        self._of = {
            kind: {r.network.name for r in rows if r.kind == kind} for kind in ("mean", "set", "alone", "group")
        }

    def identity(self) -> list[dict[str, Any]]:
        """What features depend on of the networks, in the order of their names."""
        return [self.networks[name].identity() for name in sorted(self.networks)]

    def __call__(self, images: np.ndarray, captions: list[str]) -> Features:
        """Pictures uint8 [B, H, W, 3] with their captions → features [B, d] by network; not those of "group" metrics."""
        return {name: self._extract(name, images, captions) for name in self.open if name not in self._of["group"]}

    def groups(self, images: np.ndarray, captions: list[str]) -> Features:
        """All pictures of each prompt, uint8 [P, n, H, W, 3], with the P captions → features [P, 1] of "group" metrics."""
        return {
            name: np.concatenate(
                [self._extract(name, own, [caption] * len(own)) for own, caption in zip(images, captions, strict=True)]
            )
            for name in self.open
            if name in self._of["group"]
        }

    def reference(self, data: DataSet, count: int, recipe: str = "") -> Features:
        """Features of the first ``count`` pictures of the evaluation split, for the metrics that compare sets.

        Those of networks with weights are kept in the user's folder under the hash of the pictures' content, ``recipe``
        (how they are prepared) and the network.
        """
        wanted = {name: self.networks[name] for name in self.open if name in self._of["set"]}

        def extract(networks: Sequence[str]) -> Iterator[Features]:
            with progress("reference pictures", total=count) as advance:
                for images in data.pictures(count):
                    yield {name: self._extract(name, images, [""] * len(images)) for name in networks}
                    advance(len(images))

        return kept_reference(data, count, recipe, wanted, extract)

    def _extract(self, name: str, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """The one place where a network is asked.

        Raises:
            DdilError: it gives features that are not finite.
        """
        prefix = self.prefix if self.networks[name].prefixed else ""
        found = self.open[name](images, [prefix + caption for caption in captions] if prefix else captions)
        if not np.isfinite(found).all():
            metrics = ", ".join(metric for metric in self.metrics if METRICS[metric].network.name == name)
            raise DdilError(
                f"the network {name!r} of the metric {metrics} gives features that are not finite (NaN or infinity, "
                f"{found.dtype}): its weights are damaged; get them again (see 'ddil metrics')"
            )
        return found


def kept(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a finished chunk; where it is not there yet, what ``make`` gives, kept for the next time.

    Raises:
        DdilError: the chunk is damaged, or holds numbers that are not finite.
    """
    if not path.is_file():
        arrays = make()
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stub takes every name for allow_pickle
        return arrays
    try:
        with np.load(path) as held:
            arrays = {name: held[name] for name in held.files}
        broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if broken:
            raise ValueError(f"{broken[0]} is not finite")
        return arrays
    except Exception as error:  # numpy, zipfile and zlib each have kinds of their own
        raise DdilError(f"the finished chunk {path} is damaged; delete the file to make the chunk again") from error


def concatenate(parts: Sequence[Features]) -> Features:
    """Features of several batches, one after another, in memory; ``gathered`` holds many of them on disk."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size``."""
    yield from blocks(count, size)


@dataclass(frozen=True)
class Cells:
    """Cells measured on the same prompts: for each its rows [prompts] of the shared features, held by network.

    ``metrics`` are the chosen ones; without, all that the table has on these networks.
    """

    features: Features
    rows: Mapping[str, np.ndarray]
    reference: Features
    seed: int = 0
    metrics: tuple[str, ...] = ()

    def estimates(self, contrasts: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
        """For each contrast (weights over the cells) and metric, the estimate. Prompts are paired: all cells share them.

        A contrast whose weights sum to 0 has a p-value too.
        """
        found: dict[str, dict[str, Estimate]] = {name: {} for name in contrasts}
        spreads: dict[tuple[str, object], list[Jackknife]] = {}
        for metric in self._chosen():
            features = self.features[metric.network.name]
            alone = {name: np.count_nonzero(weights) == 1 for name, weights in contrasts.items()}
            if metric.statistic is None:
                scores = np.stack([features[rows, 0] for rows in self.rows.values()], axis=1)
                low, high = metric.bounds
                for name, weights in contrasts.items():
                    found[name][metric.name] = estimate_mean(
                        scores, weights, rate=metric.rate, lowest=low, highest=high
                    )
                continue
            key = (metric.network.name, metric.statistic)
            if key not in spreads:
                reference = self.reference[metric.network.name] if metric.kind == "set" else None
                spreads[key] = self._jackknives(features, metric.statistic(reference))
            for name, weights in contrasts.items():
                low, high = metric.bounds if alone[name] else (-np.inf, np.inf)
                found[name][metric.name] = spreads[key][metric.column].estimate(
                    weights, lowest=low, highest=high, rate=metric.rate
                )
        return found

    def _chosen(self) -> list[Metric]:
        if self.metrics:
            return [METRICS[name] for name in self.metrics]
        return [metric for metric in METRICS.values() if metric.network.name in self.features]

    def _jackknives(self, features: np.ndarray, statistic: Statistic) -> list[Jackknife]:
        """One for each of the statistic's columns."""
        labels = group_labels(len(next(iter(self.rows.values()))), self.seed)
        spreads = []
        with progress("intervals", total=len(self.rows)) as advance:
            for rows in self.rows.values():
                spreads.append(statistic.spread(taken(features, rows), labels))
                advance()
        values, pseudovalues = (
            np.stack([getattr(spread, part) for spread in spreads], axis=-1) for part in ("values", "pseudovalues")
        )
        draws = [spread.draws for spread in spreads if spread.draws is not None]
        drawn = np.stack(draws, axis=-1) if draws else None
        return [
            Jackknife(
                values[column],
                pseudovalues[:, column],
                np.bincount(labels),
                None if drawn is None else drawn[:, column],
                tuple(spread.note for spread in spreads),
            )
            for column in range(len(values))
        ]

    def single(self) -> dict[str, np.ndarray]:
        """The contrasts that name each cell by itself."""
        return dict(zip(self.rows, np.eye(len(self.rows)), strict=True))


def taken(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``features[rows]``; without a copy where the rows follow one another, so that features on disk stay there."""
    first = int(rows[0])
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        return features[first : first + len(rows)]
    return features[rows]


__all__ = [
    "Arrays",
    "Cells",
    "Extractors",
    "Features",
    "batches",
    "concatenate",
    "gathered",
    "kept",
    "taken",
]
