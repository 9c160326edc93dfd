"""The share of captions drawn exactly right, as the shapes world's reader sees it: the picture alone, no network."""

from __future__ import annotations

import numpy as np

from ddil_core.shapes import reader
from ddil_eval.metrics.metric import Extractor, Metric, Network
from ddil_eval.metrics.shapes import meanings

COLUMNS = (*reader.ATTRIBUTES, "exact")


def attributes_right(images: np.ndarray, captions: list[str]) -> np.ndarray:
    """For pictures uint8 [B, 64, 64, 3], whether each of ``COLUMNS`` is as the caption says: bool [B, columns].

    What the reader cannot read is wrong. Raises DdilError for captions of another world.
    """
    stated = meanings("drawn_right", images, captions)
    rows = [reader.drawn_right(reader.read(image), meaning) for image, meaning in zip(images, stated, strict=True)]
    return np.array([[row[column] for column in COLUMNS] for row in rows], dtype=bool).reshape(len(rows), len(COLUMNS))


def attribute_shares(images: np.ndarray, captions: list[str]) -> dict[str, float]:
    """The share of pictures that have each attribute right, in [0, 1]; "exact" is the metric."""
    return dict(zip(COLUMNS, attributes_right(images, captions).mean(axis=0).tolist(), strict=True))


def _open(device: str) -> Extractor:
    return lambda images, captions: attributes_right(images, captions)[:, -1:].astype(np.float64)


DRAWN_RIGHT = Metric(
    name="drawn_right",
    title="captions drawn exactly right",
    direction="higher",
    kind="mean",
    network=Network(
        "drawn_right",
        "nothing: the reader is part of the shapes world",
        _open,
        reads_captions=True,
        shapes_alone=True,
    ),
    bounds=(0.0, 1.0),
    rate=True,
)
