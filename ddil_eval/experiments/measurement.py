"""Pictures to features, once for every distinct picture, and features to the estimates of cells and contrasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ddil_core.support.progress import progress
from ddil_eval.features.storage import Features
from ddil_eval.metrics import METRICS, Metric
from ddil_eval.statistics import Estimate, Jackknife, Statistic, estimate_mean, group_labels
from ddil_eval.statistics.moments import blocks


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
