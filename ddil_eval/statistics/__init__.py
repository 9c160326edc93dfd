"""Statistics of features, in float64: set distances, and 95 % intervals that contain their point.

Means over prompts have Student's t, corrected for skew. Set statistics have a delete-a-group jackknife, which leaves points
out and repeats none. **Nothing is bootstrapped**: a resample repeats points, which shrinks a covariance's rank and inflates a
Fréchet distance, so that the percentile interval misses its own point (computed on Gaussians with d = 64, N = 1,000: point
2.51, interval [3.45, 3.79]).

Values that are compared (the cells of a table) come from the same prompts, so differences and effects are linear
contrasts of one vector of cells: both kinds of interval take the contrast, prompt by prompt or group by group.
A contrast whose weights sum to 0 is a difference, and gets a p-value from the distribution that gives its interval.
"""

from __future__ import annotations

from ddil_eval.statistics.estimate import CONFIDENCE, Estimate, estimate_mean
from ddil_eval.statistics.frechet import FrechetInfinity, FrechetReference, frechet_distance
from ddil_eval.statistics.jackknife import Jackknife, Spread, Statistic, group_labels, jackknife
from ddil_eval.statistics.moments import GroupMoments, Moments

__all__ = [
    "CONFIDENCE",
    "Estimate",
    "FrechetInfinity",
    "FrechetReference",
    "GroupMoments",
    "Jackknife",
    "Moments",
    "Spread",
    "Statistic",
    "estimate_mean",
    "frechet_distance",
    "group_labels",
    "jackknife",
]
