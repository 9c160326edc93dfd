"""KID (Bińkowski et al., 2018): the unbiased kernel distance on Inception's features, 100 subsets of 1,000."""

from __future__ import annotations

from ddil_eval.metrics.inception import INCEPTION
from ddil_eval.metrics.metric import Metric
from ddil_eval.statistics.kernels import KernelDistance

KID = Metric(
    name="kid",
    title="kernel inception distance",
    direction="lower",
    kind="set",
    network=INCEPTION,
    statistic=KernelDistance,
)
