"""Features of a plug-in's network are one row of real numbers for each image, or no metric is made of them."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_core.support.errors import DdilError
from ddil_eval.experiments.measurement import Cells
from ddil_eval.features.extraction import Extractors
from ddil_eval.metrics import METRICS


@pytest.mark.parametrize(
    "features",
    [np.zeros(3), np.zeros((2, 1)), np.zeros((4, 1)), np.zeros((3, 2)), np.zeros((3, 1), complex), np.zeros((3, 1, 1))],
)
def test_features_of_another_shape_are_refused(features: np.ndarray) -> None:
    extractors = Extractors(["drawn_right"], "cpu")
    images, captions = np.zeros((3, 64, 64, 3), np.uint8), ["a small red circle on a grey background"] * 3
    assert extractors(images, captions)["drawn_right"].shape == (3, 1)
    extractors._loaded["drawn_right"] = lambda images, captions: features
    with pytest.raises(DdilError, match=r"^the network 'drawn_right' gives .* it must give real numbers of the shape"):
        extractors(images, captions)


def test_features_that_are_no_array_are_refused() -> None:
    extractors = Extractors(["drawn_right"], "cpu")
    extractors._loaded["drawn_right"] = lambda images, captions: [[1.0]] * 3  # type: ignore[assignment,return-value]
    with pytest.raises(DdilError) as error:
        extractors(np.zeros((3, 64, 64, 3), np.uint8), ["a"] * 3)
    assert str(error.value) == "the network 'drawn_right' gives a list for images; it must give an array of numpy"


@pytest.mark.parametrize(("score", "value"), [(1.5, "1.5"), (-1.0, "-1")])
def test_values_outside_of_the_bounds_of_a_metric_are_refused(score: float, value: str) -> None:
    name = METRICS["drawn_right"].network.name
    cells = Cells({name: np.full((8, 1), score)}, {"a": np.arange(8)}, {}, metrics=("drawn_right",))
    with pytest.raises(
        DdilError, match=rf"^the metric 'drawn_right' has the value {value}, outside of its bounds 0 to 1; "
    ):
        cells.estimates(cells.single())
