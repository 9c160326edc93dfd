"""A metric that another installed package adds to the table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ddil_eval.features.extraction import Extractors
from ddil_eval.metrics import METRICS

MODULE = """
from ddil_eval.metrics import Metric, Network

network = Network("toy_network", "nothing", lambda device: lambda images, captions: images.mean((1, 2))[:, :1] / 255)
METRIC = Metric("toy_metric", "redness", "higher", "mean", network)
"""


def test_a_metric_of_another_package_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddil.metrics]\ntoy_metric = toy_metric:METRIC\n")
    (tmp_path / "toy_metric.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_metric", raising=False)
    monkeypatch.setattr(METRICS, "_added", None)
    assert list(METRICS)[-1] == "toy_metric"
    features = Extractors(["toy_metric"], "cpu")(np.full((2, 8, 8, 3), 255, np.uint8), ["a", "b"])
    np.testing.assert_array_equal(features["toy_network"], np.ones((2, 1)))
