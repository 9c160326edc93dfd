"""CLIP scores: the cosine between a picture and its caption, unscaled, in [-1, 1], float32."""

from __future__ import annotations

import numpy as np

from ddil_core.shapes import scorer
from ddil_eval.metrics.metric import Extractor, Metric, Network
from ddil_eval.metrics.shapes import meanings


def open_shapes_scorer(device: str) -> Extractor:
    """The shapes world's own two-tower scorer on its pictures, 64 × 64 as they are."""
    model, preprocess, tokenize = scorer.load_scorer(scorer.WEIGHTS, device)

    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        meanings("clip_score_shapes", images, captions)
        return scorer.cosine(model, preprocess(images), tokenize(captions))

    return extract


CLIP_SCORE_SHAPES = Metric(
    name="clip_score_shapes",
    title="CLIP score of the shapes world's scorer",
    direction="higher",
    kind="mean",
    network=Network(
        name="clip_score_shapes",
        needs="the two-tower scorer shipped with the shapes world, open_clip and torchvision",
        open_on=open_shapes_scorer,
        lacks=lambda: scorer.missing(scorer.WEIGHTS),
        reads_captions=True,
        shapes_alone=True,
    ),
    bounds=(-1.0, 1.0),
)
