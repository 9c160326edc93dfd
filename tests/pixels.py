"""Two small metrics on pixels for tests of what surrounds metrics: quick, and different for every picture."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_eval import metrics
from ddil_eval.metrics import Extractor, Metric, Network
from ddil_eval.statistics import FrechetReference


def add_metric(patch: pytest.MonkeyPatch, metric: Metric) -> None:
    """Put a metric into the table of metrics until the patch ends."""
    patch.setitem(metrics.METRICS._own, metric.name, metric)


def brightness(images: np.ndarray) -> np.ndarray:
    """Each picture's mean, in [0, 1]: [B, 1]."""
    return images.mean(axis=(1, 2, 3), dtype=np.float64)[:, None] / 255


def mosaic(images: np.ndarray) -> np.ndarray:
    """Means over 4 × 4 fields: [B, 48]."""
    fields = images.reshape(len(images), 4, images.shape[1] // 4, 4, images.shape[2] // 4, 3)
    return fields.mean(axis=(2, 4), dtype=np.float64).reshape(len(images), 48) / 255


def _open_brightness(device: str) -> Extractor:
    return lambda images, captions: brightness(images)


def _open_mosaic(device: str) -> Extractor:
    return lambda images, captions: mosaic(images)


METRICS = (
    Metric("brightness", "mean brightness", "higher", "mean", Network("brightness", "nothing", _open_brightness)),
    Metric(
        "fd_mosaic", "Fréchet distance of mosaics", "lower", "set", Network("fd_mosaic", "nothing", _open_mosaic),
        FrechetReference, bounds=(0.0, float("inf")),
    ),
)  # fmt: skip
NAMES = tuple(metric.name for metric in METRICS)
