"""The table of metrics: one file and one row each."""

from __future__ import annotations

from ddil_eval.metrics import clip_score, drawn_right, frechet
from ddil_eval.metrics.metric import Extractor, Metric

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (frechet.FD_EFFLITE0, clip_score.CLIP_SCORE_SHAPES, drawn_right.DRAWN_RIGHT)
}

__all__ = ["METRICS", "Extractor", "Metric"]
