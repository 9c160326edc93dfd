"""Batches of the shapes world, drawn on the fly. A batch depends on (split, seed, index) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddil_core.shapes.render import render
from ddil_core.shapes.scene import Scene, draw_scene

SPLIT_KEY = {"train": 0, "validation": 1}

TRAIN_SEED = 2
"""The seed of the images for distillation. The shipped networks were trained on images of other seeds."""


@dataclass(frozen=True)
class ShapesBatch:
    """``images``, uint8 [B, H, W, 3], and the ``scenes`` that they show."""

    images: np.ndarray
    scenes: list[Scene]

    @property
    def captions(self) -> list[str]:
        return [scene.meaning.caption for scene in self.scenes]

    def pixels(self) -> Tensor:
        """Return the images as float32 [B, 3, H, W] in [-1, 1]."""
        return to_pixels(self.images)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def draw_batch(size: int, index: int, *, split: str = "train", seed: int = 0) -> ShapesBatch:
    """Draw the batch of this index in a split, "train" or "validation"."""
    rng = np.random.default_rng([SPLIT_KEY[split], seed, index])
    scenes = [draw_scene(rng, split) for _ in range(size)]
    return ShapesBatch(np.stack([render(scene) for scene in scenes]), scenes)
