"""The shapes world as a data set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ddil_core.data.base import Prompt, Side
from ddil_core.shapes.batches import SPLIT_KEY, TRAIN_SEED, draw_batch
from ddil_core.shapes.render import render
from ddil_core.shapes.scene import IMAGE_SIZE, Scene, draw_scene


class ShapesData:
    """The shapes world as a ``ddil_core.data.base.DataSet``. Its images are drawn when they are read."""

    reference = "shapes"
    side: int | None = IMAGE_SIZE

    def identity(self) -> str:
        """Return the reference: the training images never change."""
        return self.reference

    def require(self, count: int, side: Side) -> None:
        """Accept any count: the images are drawn on the fly."""

    def training(
        self, count: int, side: Side = IMAGE_SIZE, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See ``DataSet``. ``side`` is ignored: all images have ``IMAGE_SIZE`` pixels a side."""
        for index, start in enumerate(range(0, count, batch_size)):
            if index >= first:
                yield self.batch(min(batch_size, count - start), index)

    def batch(self, size: int, index: int) -> tuple[np.ndarray, list[str]]:
        """Return the training batch of this index: images uint8 [size, 64, 64, 3] and their captions."""
        batch = draw_batch(size, index, seed=TRAIN_SEED)
        return batch.images, batch.captions

    def prompts(self, count: int) -> list[Prompt]:
        """See ``DataSet``."""
        return [Prompt(f"shapes-validation-{i:05d}", self.scene(i).meaning.caption) for i in range(count)]

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """See ``DataSet``."""
        for start in range(0, count, batch_size):
            yield np.stack([render(self.scene(i)) for i in range(start, min(start + batch_size, count))])

    def scene(self, index: int) -> Scene:
        """Return the scene of this index in the validation split."""
        return draw_scene(np.random.default_rng([SPLIT_KEY["validation"], 0, index]), "validation")
