"""The gaussians world as a data set: points of the shipped mixture, with their classes as captions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ddil_core.data.base import Prompt, Side
from ddil_core.gaussians.world import class_name, draw_classes, draw_points, shipped_mixture

TRAINING, VALIDATION = 0, 1
"""The first number of each split's seeds."""


class GaussiansData:
    """The gaussians world as a ``ddil_core.data.base.DataSet``. Its points are drawn when they are read.

    An image is a point, float32 [1, 1, D]. Its caption is its class, drawn by the probability of the classes.
    """

    reference = "gaussians"
    side: int | None = 1

    def __init__(self) -> None:
        self.mixture = shipped_mixture()

    def identity(self) -> str:
        """Return the reference: the training points never change."""
        return self.reference

    def require(self, count: int, side: Side) -> None:
        """Accept any count: the points are drawn when they are read."""

    def training(
        self, count: int, side: Side = 1, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See ``DataSet``. ``side`` is ignored: a point has no size."""
        for index, start in enumerate(range(0, count, batch_size)):
            if index >= first:
                points, classes = self.draw(min(batch_size, count - start), [TRAINING, index])
                yield points, [class_name(label) for label in classes]

    def prompts(self, count: int) -> list[Prompt]:
        """See ``DataSet``. The name of a prompt holds its number, so that each has noise of its own."""
        return [
            Prompt(f"gaussians-validation-{i:06d}", class_name(label)) for i, label in enumerate(self.classes(count))
        ]

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """See ``DataSet``."""
        points = draw_points(self.mixture, self.classes(count), np.random.default_rng([VALIDATION, 1]))
        for start in range(0, count, batch_size):
            yield points[start : start + batch_size, None, None]

    def classes(self, count: int) -> np.ndarray:
        """Return the classes of the first ``count`` prompts of the validation split, int64 [count]."""
        return draw_classes(self.mixture, count, np.random.default_rng([VALIDATION, 0]))

    def draw(self, size: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return points float32 [size, 1, 1, D] and their classes int64 [size]."""
        random = np.random.default_rng(seed)
        classes = draw_classes(self.mixture, size, random)
        return draw_points(self.mixture, classes, random)[:, None, None], classes
