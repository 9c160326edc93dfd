"""From the features of images to the estimates of cells and of their contrasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ddil_core.support.errors import DdilError
from ddil_core.support.progress import progress
from ddil_eval.features.storage import Features
from ddil_eval.metrics import METRICS, Metric
from ddil_eval.statistics import Estimate, Jackknife, Statistic, estimate_mean, group_labels
from ddil_eval.statistics.estimate import Families, is_level

ROUNDING = 1e-4
"""How far rounding may move a value over a bound of its metric."""


@dataclass(frozen=True)
class Cells:
    """Cells that were measured on the same prompts.

    Attributes:
        features: The features [M, d] of all images, by network.
        rows: For each cell, the rows of its images among the M, one for each prompt.
        reference: The features of the reference, by network.
        seed: The seed of the jackknife's groups.
        metrics: The names of the metrics. Defaults to all metrics of these networks.
    """

    features: Features
    rows: Mapping[str, np.ndarray]
    reference: Features
    seed: int = 0
    metrics: tuple[str, ...] = ()

    def estimates(
        self, contrasts: Mapping[str, np.ndarray], by_seed: Mapping[str, Families] | None = None
    ) -> dict[str, dict[str, Estimate]]:
        """Estimate every metric of every contrast. The cells share their prompts, so the prompts are paired.

        Args:
            contrasts: Weights [cells], by the contrast's name. A contrast with the sum 0 gets a p-value too.
            by_seed: For contrasts of students of several training seeds, their families of seeds.

        Returns:
            Estimates by contrast and metric.

        Raises:
            DdilError: a value is outside of the bounds of its metric.
        """
        estimates: dict[str, dict[str, Estimate]] = {name: {} for name in contrasts}
        jackknives: dict[tuple[str, object], list[Jackknife]] = {}
        families = by_seed or {}
        for metric in self._chosen():
            features = self.features[metric.network.name]
            alone = {name: is_level(weights) for name, weights in contrasts.items()}
            if metric.statistic is None:
                scores = np.stack([features[rows, 0] for rows in self.rows.values()], axis=1)
                low, high = metric.bounds
                _require_bounds(metric, scores.mean(axis=0))
                for name, weights in contrasts.items():
                    estimates[name][metric.name] = estimate_mean(
                        scores, weights, families.get(name, ()), rate=metric.rate, lowest=low, highest=high
                    )
                continue
            key = (metric.network.name, metric.statistic)
            if key not in jackknives:
                reference = self.reference[metric.network.name] if metric.kind == "set" else None
                jackknives[key] = self._jackknives(features, metric.statistic(reference))
            if jackknives[key][metric.column].draws is None:  # an extrapolation from random subsets may pass a bound
                _require_bounds(metric, jackknives[key][metric.column].values)
            for name, weights in contrasts.items():
                low, high = metric.bounds if alone[name] else (-np.inf, np.inf)
                estimates[name][metric.name] = jackknives[key][metric.column].estimate(
                    weights, families.get(name, ()), lowest=low, highest=high, rate=metric.rate
                )
        return estimates

    def _chosen(self) -> list[Metric]:
        if self.metrics:
            return [METRICS[name] for name in self.metrics]
        return [metric for metric in METRICS.values() if metric.network.name in self.features]

    def _jackknives(self, features: np.ndarray, statistic: Statistic) -> list[Jackknife]:
        """Return a jackknife for each column of the statistic."""
        labels = group_labels(len(next(iter(self.rows.values()))), self.seed)
        spreads = []
        with progress("intervals", total=len(self.rows)) as advance:
            for rows in self.rows.values():
                spreads.append(statistic.spread(select_rows(features, rows), labels))
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
        """Return the contrasts that are one cell each."""
        return dict(zip(self.rows, np.eye(len(self.rows)), strict=True))


def _require_bounds(metric: Metric, values: np.ndarray) -> None:
    """Refuse values of single cells outside of the bounds that the metric states. Rounding may pass them a little.

    Raises:
        DdilError: a value is outside.
    """
    low, high = metric.bounds
    outside = values[(values < low - ROUNDING) | (values > high + ROUNDING)]
    if outside.size:
        raise DdilError(
            f"the metric {metric.name!r} has the value {outside[0]:g}, outside of its bounds {low:g} to {high:g}; mend "
            "the package that brings the metric, or the weights of its network"
        )


def select_rows(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return ``features[rows]``: a view if the rows follow one another, so that features on disk are not loaded."""
    first = int(rows[0])
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        return features[first : first + len(rows)]
    return features[rows]
