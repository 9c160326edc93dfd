"""What the metrics of the shapes world ask of their input."""

from __future__ import annotations

import numpy as np

from ddil_core.shapes.scene import IMAGE_SIZE, Meaning, parse_caption
from ddil_core.support.errors import DdilError


def meanings(metric: str, images: np.ndarray, captions: list[str]) -> list[Meaning]:
    """What the captions of pictures [B, 64, 64, 3] state.

    Raises:
        DdilError: pictures or a caption that are not of the shapes world, or not as many of one as of the other.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or len(images) != len(captions):
        raise DdilError(
            f"{metric} measures the shapes world's pictures, uint8 [{len(captions)}, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], "
            f"not {images.dtype} {list(images.shape)}; leave it out for other models"
        )
    try:
        return [parse_caption(caption) for caption in captions]
    except ValueError as error:
        raise DdilError(f"{metric} cannot be measured: {error}") from error
