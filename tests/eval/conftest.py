"""Pipelines and metrics that the tests of experiments share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pipelines import student, teacher

__all__ = ["student", "teacher"]


@pytest.fixture(scope="module")
def pixel_metrics() -> Iterator[tuple[str, ...]]:
    """The names of ``tests.pixels``' metrics, in the table of metrics until the module is done."""
    from tests import pixels

    with pytest.MonkeyPatch.context() as patch:
        for metric in pixels.METRICS:
            pixels.add_metric(patch, metric)
        yield pixels.NAMES
