"""Features of a plug-in's network are one row of real numbers for each image, or no metric is made of them."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_core.support.errors import DdilError
from ddil_eval.features.extraction import Extractors


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
