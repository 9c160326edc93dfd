"""The Vendi score (Friedman and Dieng, 2023) with cosine similarity: how many different pictures a set is worth.

It depends on the features, so each network's has its own name: DINOv2's, as in dgm-eval, and EfficientNet-Lite0's.
"""

from __future__ import annotations

from math import inf

from ddil_eval.metrics.dinov2 import DINOV2
from ddil_eval.metrics.efflite0 import EFFLITE0
from ddil_eval.metrics.metric import Metric, Network
from ddil_eval.statistics.vendi import Vendi


def _vendi(name: str, of: str, network: Network) -> Metric:
    title = f"Vendi score on {of}'s features"
    return Metric(name, title, "higher", "alone", network, statistic=Vendi, bounds=(1.0, inf))


VENDI = _vendi("vendi_dinov2", "DINOv2", DINOV2)
VENDI_EFFLITE0 = _vendi("vendi_efflite0", "EfficientNet-Lite0", EFFLITE0)
