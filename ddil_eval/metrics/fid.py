"""FID (Heusel et al., 2017) as clean-fid prepares pictures: the Fréchet distance on Inception's features."""

from __future__ import annotations

from math import inf

from ddil_eval.metrics.inception import INCEPTION
from ddil_eval.metrics.metric import Metric
from ddil_eval.statistics import FrechetReference

FID = Metric(
    name="fid",
    title="Fréchet inception distance, clean-fid",
    direction="lower",
    kind="set",
    network=INCEPTION,
    statistic=FrechetReference,
    bounds=(0.0, inf),
)
