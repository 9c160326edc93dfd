"""The metrics: one table of rows (``table.py``), and one file for each network that turns images into features."""

from __future__ import annotations

from ddil_eval.metrics.metric import Extractor, Metric, Network
from ddil_eval.metrics.table import METRICS
from ddil_eval.metrics.weights_file import WeightsFile

__all__ = ["METRICS", "Extractor", "Metric", "Network", "WeightsFile"]
