"""What every data set offers: training batches that depend on their index alone, and an evaluation split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Side = int | tuple[int, int]
"""The side of a square image in pixels, or (height, width) of another image."""


def in_words(side: Side) -> str:
    """Return the side of a square, or the height and the width of another image, for a message."""
    return f"{side}" if isinstance(side, int) else f"{side[0]} x {side[1]}"


@dataclass(frozen=True)
class Prompt:
    """A prompt of the evaluation split. Its noise is drawn from ``id``."""

    id: str
    text: str


class DataSet(Protocol):
    """Images with captions: a training split and an evaluation split, each in a fixed order.

    Attributes:
        reference: The data set's reference, as the user wrote it.
        side: The side of the training images in pixels; None where ``training`` resizes the images.
    """

    reference: str
    side: int | None

    def identity(self) -> str:
        """Return a text that changes when the training images change. This method does not read the images."""
        ...

    def require(self, count: int, side: Side) -> None:
        """Check the first ``count`` training images, if that is quick. Raises DdilError where training would fail."""
        ...

    def training(
        self, count: int, side: Side, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Yield the first ``count`` training images, uint8 [B, H, W, 3], with their captions.

        A batch depends on its index and on ``batch_size`` alone, and not on the batches that were read before it.

        Args:
            count: The number of training images in all batches together.
            side: The side to which the images are resized, or (height, width) where they are no squares.
            batch_size: The number of images in a batch; the last batch may be smaller.
            first: The index of the first batch that is yielded.
        """
        ...

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first ``count`` prompts of the evaluation split."""
        ...

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """Yield the first ``count`` images of the evaluation split, in batches uint8 [B, H, W, 3]."""
        ...
