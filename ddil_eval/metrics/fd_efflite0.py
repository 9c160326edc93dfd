"""``fd_efflite0``: the Fréchet distance on EfficientNet-Lite0's features.

It is not FID, which is defined on one Inception network: the two do not compare.
"""

from __future__ import annotations

from math import inf

from ddil_eval.metrics.efflite0 import EFFLITE0
from ddil_eval.metrics.metric import Metric
from ddil_eval.statistics import FrechetReference

FD_EFFLITE0 = Metric(
    name="fd_efflite0",
    title="Fréchet distance on EfficientNet-Lite0's features",
    direction="lower",
    kind="set",
    network=EFFLITE0,
    statistic=FrechetReference,
    bounds=(0.0, inf),
)
