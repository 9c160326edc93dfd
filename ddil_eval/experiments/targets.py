"""The images that are inverted, and the words that their prompts may hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddil_core.data.base import DataSet, Side
from ddil_core.data.captioned import prepare_image, read_image
from ddil_core.data.folder import ImageFiles
from ddil_core.inversion.towers import SHAPES
from ddil_core.inversion.words import Vocabulary
from ddil_eval.experiments.inversion_config import InversionConfig


@dataclass(frozen=True)
class TargetImages:
    """The images that are inverted.

    Attributes:
        ids: N names.
        images: uint8 [N, H, W, 3], in [0, 255].
        captions: The N true captions in the shapes world; None elsewhere.
    """

    ids: tuple[str, ...]
    images: np.ndarray
    captions: tuple[str, ...] | None


def read_targets(data: DataSet, count: int, size: Side) -> TargetImages:
    """Read the first ``count`` images, cropped to their middle and resized to ``size`` (``prepare_image``).

    Raises:
        DdilError: an image cannot be read; the message names it.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(data, ImageFiles):
        files = data.take(count, "images")
        images = np.stack([prepare_image(read_image(file.path), size) for file in files])
        return TargetImages(tuple(file.id for file in files), images, None)
    images = np.stack(
        [
            image if image.shape[:2] == (height, width) else prepare_image(image, size)
            for batch in data.images(count)
            for image in batch
        ]
    )
    prompts = data.prompts(count)
    captions = tuple(prompt.text for prompt in prompts) if data.reference == SHAPES else None
    return TargetImages(tuple(prompt.id for prompt in prompts), images, captions)


def vocabulary(config: InversionConfig) -> Vocabulary | tuple[str, ...]:
    """Return the words that prompts may hold, or the name of a vocabulary."""
    if config.vocabulary is None and config.data == SHAPES:
        from ddil_core.shapes.training.architecture import caption_words

        return tuple(caption_words())
    return config.vocabulary or "words"
