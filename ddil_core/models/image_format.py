"""What an image is: how its numbers become the values that an autoencoder reads, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFormat:
    """The numbers of images [B, H, W, C], and the values [B, C, H, W] of the same images for an autoencoder.

    Attributes:
        to_values: Returns the values, float32, of images.
        to_images: Returns the images of values, with the channels first: [B, C, H, W].
        stored: The dtype in which encoded images are stored.
        pictures: Whether the images are pictures, which files and figures can show.
    """

    to_values: Callable[[np.ndarray], Tensor]
    to_images: Callable[[Tensor], Tensor]
    stored: torch.dtype
    pictures: bool = True


def _levels_to_values(images: np.ndarray) -> Tensor:
    return _channels_first(images).float() / 127.5 - 1


def _values_to_levels(values: Tensor) -> Tensor:
    return (values.float() * 127.5 + 127.5).round_().clamp_(0, 255).byte()


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


LEVELS = ImageFormat(_levels_to_values, _values_to_levels, torch.float16)
"""Pictures: levels uint8 in [0, 255], whose values lie in [−1, 1]."""
POINTS = ImageFormat(_channels_first, Tensor.float, torch.float32, pictures=False)
"""Points float32 [B, 1, 1, D], which are their own values. They are few numbers, so they are stored unrounded."""
