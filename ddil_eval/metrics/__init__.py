"""The table of metrics: one file and one row each."""

from __future__ import annotations

from ddil_eval.metrics import clip_score, drawn_right, fd_efflite0
from ddil_eval.metrics.metric import Extractor, Metric, Network
from ddil_eval.metrics.weights import Weights

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (fd_efflite0.FD_EFFLITE0, clip_score.CLIP_SCORE_SHAPES, drawn_right.DRAWN_RIGHT)
}

__all__ = ["METRICS", "Extractor", "Metric", "Network", "Weights"]
