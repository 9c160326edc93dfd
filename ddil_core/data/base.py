"""Captioned pictures by reference, as streams whose batches depend on their index alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A prompt of the evaluation split, with the name that its noise is drawn from."""

    id: str
    text: str


class DataSet(Protocol):
    """Captioned pictures: those to train on, and an evaluation split, both in a fixed order."""

    reference: str
    side: int | None
    """The side of its pictures in pixels; None where they are prepared to the side that is asked for."""

    def identity(self) -> str:
        """What the training pictures are, as far as it is known without reading them; other pictures, another identity."""
        ...

    def require(self, count: int, side: int) -> None:
        """Look at the first ``count`` training pictures, as far as that is quick. Raises DdilError where they cannot be used."""
        ...

    def training(
        self, count: int, side: int, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """The first ``count`` training pictures, uint8 [B, side, side, 3] with their captions, from the ``first`` batch on.

        A batch depends on its index and ``batch_size`` alone: never on which batches were asked for before it.
        """
        ...

    def prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` prompts of the evaluation split."""
        ...

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """The first ``count`` pictures of the evaluation split, in batches uint8 [B, H, W, 3]."""
        ...
