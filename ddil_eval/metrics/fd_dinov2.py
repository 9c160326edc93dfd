"""FD-DINOv2 (Stein et al., 2023): the Fréchet distance on DINOv2's features."""

from __future__ import annotations

from math import inf

from ddil_eval.metrics.dinov2 import DINOV2
from ddil_eval.metrics.metric import Metric
from ddil_eval.statistics import FrechetReference

FD_DINOV2 = Metric(
    name="fd_dinov2",
    title="Fréchet distance on DINOv2's features",
    direction="lower",
    kind="set",
    network=DINOV2,
    statistic=FrechetReference,
    bounds=(0.0, inf),
)
