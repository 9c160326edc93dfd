"""Batches of the shapes world, drawn on the fly. A batch depends on (split, seed, index) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddil_core.data.dataset import Prompt
from ddil_core.errors import DdilError
from ddil_core.finite import all_finite
from ddil_core.shapes.render import render
from ddil_core.shapes.scene import IMAGE_SIZE, Scene, draw_scene

_SPLIT_KEY = {"train": 0, "validation": 1}
TRAIN_SEED = 2
"""The stream that distillation trains on; the shipped networks were trained on others."""


@dataclass(frozen=True)
class Batch:
    """``images`` uint8 [B, H, W, 3] with the ``scenes`` that they show."""

    images: np.ndarray
    scenes: list[Scene]

    @property
    def captions(self) -> list[str]:
        return [scene.meaning.caption for scene in self.scenes]

    def pixels(self) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1]."""
        return to_pixels(self.images)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_images(pixels: Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] → uint8 [B, H, W, 3], rounded. Raises DdilError: they are not finite."""
    if not all_finite([pixels]):
        raise DdilError("pictures that hold NaN or an infinity cannot be shown; look for the network that drew them")
    return pixels.float().add(1).mul(127.5).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def draw_batch(size: int, index: int, *, split: str = "train", seed: int = 0) -> Batch:
    """The ``index``-th batch of a split's endless stream."""
    rng = np.random.default_rng([_SPLIT_KEY[split], seed, index])
    scenes = [draw_scene(rng, split) for _ in range(size)]
    return Batch(np.stack([render(scene) for scene in scenes]), scenes)


class ShapesData:
    """The shapes world as a data set (``ddil_core.data.dataset.DataSet``)."""

    reference = "shapes"
    side: int | None = IMAGE_SIZE

    def identity(self) -> str:
        """A stream of its own, which nothing changes."""
        return self.reference

    def require(self, count: int, side: int) -> None:
        """Nothing can be missing: they are drawn."""

    def training(
        self, count: int, side: int = IMAGE_SIZE, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """The first ``count`` pictures, from the ``first`` batch on; ``side`` is their own."""
        for index, start in enumerate(range(0, count, batch_size)):
            if index >= first:
                yield self.batch(min(batch_size, count - start), index)

    def batch(self, size: int, index: int) -> tuple[np.ndarray, list[str]]:
        batch = draw_batch(size, index, seed=TRAIN_SEED)
        return batch.images, batch.captions

    def prompts(self, count: int) -> list[Prompt]:
        return [Prompt(f"shapes-validation-{i:05d}", self.scene(i).meaning.caption) for i in range(count)]

    def pictures(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        for start in range(0, count, batch_size):
            yield np.stack([render(self.scene(i)) for i in range(start, min(start + batch_size, count))])

    def scene(self, index: int) -> Scene:
        """The ``index``-th scene of the validation split."""
        return draw_scene(np.random.default_rng([_SPLIT_KEY["validation"], 0, index]), "validation")
