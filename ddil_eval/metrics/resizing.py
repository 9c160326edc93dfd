"""Resizing of images for networks, as Pillow does it."""

from __future__ import annotations

import numpy as np

from ddil_core.support.side_by_side import side_by_side


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [B, H, W, 3] to uint8 [B, size, size, 3] by Pillow's antialiased bicubic."""
    from PIL import Image

    def resize(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))

    return np.stack(side_by_side(resize, images))
