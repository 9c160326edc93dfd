"""Images of prompts in batches, which may still be drawn when a batch is handed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ddil_core.data.base import Prompt


@dataclass(frozen=True)
class ImageBatch:
    """The images of P prompts.

    Attributes:
        start: The number of prompts in earlier batches.
        begun: Waits for the images and returns them. A GPU may still draw them.
        prompts: The P prompts.
        number: The number of images of each prompt.
    """

    start: int
    begun: Callable[[], np.ndarray | list[np.ndarray]]
    prompts: Sequence[Prompt]
    number: int = 1

    @cached_property
    def images(self) -> np.ndarray | list[np.ndarray]:
        """uint8 [P · number, H, W, 3], in [0, 255], or a list of uint8 [H, W, 3] where the sizes differ.

        The images of one prompt follow one another.

        Raises:
            DdilError: latents or images that a model made are not finite.
        """
        return self.begun()

    @property
    def captions(self) -> list[str]:
        """The caption of each image."""
        return [prompt.text for prompt in self.prompts for _ in range(self.number)]


class ImageBatches(Protocol):
    """A sized sequence of batches. Each batch can be made alone, so that a stopped run goes on.

    Each prompt has ``number`` images. Each batch has ``per_batch`` prompts; the last may have fewer.
    """

    @property
    def number(self) -> int: ...

    @property
    def per_batch(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageBatch: ...
