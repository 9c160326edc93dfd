"""The types that all inverters share: the problem, the row of an inverter, and the best words found so far."""

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
    """Images that an inverter finds prompts for, in one batch.

    The rows are independent. The random numbers of a row depend on its id and the seed alone.

    Attributes:
        model: The diffusion model that the prompts are for.
        words: The words that the model's prompts may hold.
        images: uint8 [B, H, W, 3], of the model's own size.
        ids: The images' ids, [B].
        seed: The seed of all random numbers.
        towers: CLIP's two towers, or None where they are missing.
        tower_words: The words that the prompts of CLIP's text tower may hold.
    """

    model: Model
    words: Words
    images: np.ndarray
    ids: tuple[str, ...]
    seed: int
    towers: Towers | None = None
    tower_words: Words | None = None

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return a random generator for each image."""
        return [generator_for(self.seed, name, 0, f"inversion {purpose}") for name in self.ids]

    def latents(self) -> Tensor:
        """Return x₀ float32 [B, C, h, w]: the means of the autoencoder's posteriors."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.model.encode_images(pixels)[0]


Candidates = list[list[str]]
"""For each image, the candidate prompts; each image has the same number of them."""


@dataclass(frozen=True)
class Inverter:
    """A row of ``INVERTERS``.

    Attributes:
        name: The name in protocols and records.
        title: One line for tables and lists.
        settings: The class of the inverter's settings.
        run: Takes a problem, the settings and ``advance``. Returns the candidates. Calls ``advance`` after each
            evaluation.
        evaluations: Returns the number of evaluations for these settings, which is the length of the progress bar.
        source: The paper.
        needs_towers: Whether CLIP's towers are needed with these settings: to search, or to choose among candidates.
    """

    name: str
    title: str
    settings: type[Strict]
    run: Callable[[InversionProblem, Any, Callable[[], None]], Candidates]
    evaluations: Callable[[Any], int]
    source: str
    needs_towers: Callable[[Any], bool] = lambda settings: True


class Best:
    """The lowest loss of each row, and its words. The losses of a row must share their noise."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor] | None = None

    def update(self, losses: Tensor, index: Tensor) -> None:
        """Compare with new losses [B] of words int64 [B, K].

        Raises:
            DdilError: a loss is NaN or infinite.
        """
        if not losses.isfinite().all():
            raise DdilError(
                "the loss of a prompt is NaN or infinite, so that prompts cannot be compared; the weights of the model "
                "or of CLIP are damaged: download or train them again"
            )
        if self._held is None:
            self._held = losses, index
            return
        better = losses < self._held[0]
        self._held = torch.where(better, losses, self._held[0]), torch.where(better[:, None], index, self._held[1])

    @property
    def losses(self) -> Tensor:
        """The lowest losses, [B]."""
        return self._require()[0]

    @property
    def index(self) -> Tensor:
        """The words of the lowest losses, int64 [B, K]."""
        return self._require()[1]

    def _require(self) -> tuple[Tensor, Tensor]:
        assert self._held is not None, "update() comes first"
        return self._held


def transposed(rounds: Sequence[list[str]]) -> Candidates:
    """Turn prompts by (round, image) into prompts by (image, round)."""
    return [list(prompts) for prompts in zip(*rounds, strict=True)]
