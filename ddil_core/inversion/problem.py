"""What an inverter is given, and what it is: pictures in, prompts out, each picture by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_core.diffusion.noise import generator_for
from ddil_core.inversion.towers import Towers
from ddil_core.inversion.words import Words
from ddil_core.models.model import Model
from ddil_core.support.errors import DdilError
from ddil_core.support.protocol import Strict


@dataclass(frozen=True, eq=False)
class InversionProblem:
    """Pictures uint8 [B, H, W, 3] of the model's own size, by ``ids`` [B], that are inverted together.

    ``words`` are the model's; ``towers`` CLIP's, with ``tower_words``, where they are here. Rows are independent: what is
    random in one comes from its id and the seed.
    """

    model: Model
    words: Words
    images: np.ndarray
    ids: tuple[str, ...]
    seed: int
    towers: Towers | None = None
    tower_words: Words | None = None

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One for each picture."""
        return [generator_for(self.seed, name, 0, f"inversion {purpose}") for name in self.ids]

    def latents(self) -> Tensor:
        """x₀ float32 [B, C, h, w], the means of the autoencoder's posteriors."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.model.encode_images(pixels)[0]


Candidates = list[list[str]]
"""For each picture the prompts to choose from by their pictures, as many for each."""


@dataclass(frozen=True)
class Inverter:
    """A row of ``INVERTERS``: ``run`` takes a problem, the row's ``settings`` and ``advance``, called once an evaluation."""

    name: str
    title: str
    settings: type[Strict]
    run: Callable[[InversionProblem, Any, Callable[[], None]], Candidates]
    evaluations: Callable[[Any], int]
    needs_towers: bool
    source: str


class Best:
    """The words of the lowest loss of each row. All losses of a row have to be of the same noise, or of none."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor] | None = None

    def see(self, losses: Tensor, index: Tensor) -> None:
        """Losses [B] of words int64 [B, K].

        Raises:
            DdilError: a loss is NaN or infinite, which nothing can be compared with.
        """
        if not losses.isfinite().all():
            raise DdilError(
                "the loss of a prompt is NaN or infinite, so that prompts cannot be compared; the weights of the model or of CLIP "
                "are damaged: fetch or make them again"
            )
        if self._held is None:
            self._held = losses, index
            return
        better = losses < self._held[0]
        self._held = torch.where(better, losses, self._held[0]), torch.where(better[:, None], index, self._held[1])

    @property
    def losses(self) -> Tensor:
        """The lowest losses [B]."""
        return self._seen()[0]

    @property
    def index(self) -> Tensor:
        """Their words, int64 [B, K]."""
        return self._seen()[1]

    def _seen(self) -> tuple[Tensor, Tensor]:
        assert self._held is not None, "nothing was seen"
        return self._held


def transposed(rounds: Sequence[list[str]]) -> Candidates:
    """Prompts by round and picture → by picture and round."""
    return [list(prompts) for prompts in zip(*rounds, strict=True)]
