"""Precision, recall, density and coverage on Inception's features, 5 nearest neighbours: four rows of one statistic."""

from __future__ import annotations

from math import inf

from ddil_eval.metrics.inception import INCEPTION
from ddil_eval.metrics.metric import Metric
from ddil_eval.statistics.neighbours import COLUMNS, Neighbours

_TITLES = {
    "precision": "precision: pictures within the reference",
    "recall": "recall: the reference within the pictures",
    "density": "density: how thick the reference lies about pictures",
    "coverage": "coverage: reference pictures that have one near",
}

PRDC = tuple(
    Metric(
        name=name,
        title=_TITLES[name],
        direction="higher",
        kind="set",
        network=INCEPTION,
        statistic=Neighbours,
        column=column,
        bounds=(0.0, inf if name == "density" else 1.0),
        rate=True,
    )
    for column, name in enumerate(COLUMNS)
)
