"""FID∞ (Chong and Forsyth, 2020): FID's limit for endlessly many pictures, by a line in 1/N."""

from __future__ import annotations

from math import inf

from ddil_eval.metrics.inception import INCEPTION
from ddil_eval.metrics.metric import Metric
from ddil_eval.statistics import FrechetInfinity

FID_INFINITY = Metric(
    name="fid_infinity",
    title="FID∞: FID's limit for N → ∞",
    direction="lower",
    kind="set",
    network=INCEPTION,
    statistic=FrechetInfinity,
    bounds=(0.0, inf),
)
