"""Invert images in batches of one size. Choose among the candidates of each by the images that the model generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ddil_core.diffusion.noise import Sample
from ddil_core.inversion.problem import InversionProblem, Inverter
from ddil_core.inversion.towers import missing_towers
from ddil_core.models.generate import sample_images
from ddil_core.models.memory import on_device
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import DdilError
from ddil_core.support.protocol import Strict


@dataclass(frozen=True)
class SelectionSettings:
    """How to choose among candidates: the model's sampling, and the number of images for each candidate.

    PH2P's authors generate one image.
    """

    sampling: Sampling
    images: int = 1

    def identity(self) -> dict[str, Any]:
        """Return the settings as they enter the names of work folders, where the number of images has its old key."""
        return {"sampling": asdict(self.sampling), "pictures": self.images}


@dataclass(frozen=True)
class InvertedPrompt:
    """The prompt of an image.

    Attributes:
        id: The image's id.
        prompt: The chosen candidate.
        candidates: All candidates, without repetitions.
        similarity: The mean cosine, by CLIP's image tower, of the image with what the model generates from the prompt.
            None where there was one candidate.
    """

    id: str
    prompt: str
    candidates: tuple[str, ...]
    similarity: float | None = None


def invert(
    whole: InversionProblem,
    inverter: Inverter,
    settings: Strict,
    batch_size: int,
    selection: SelectionSettings,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[list[InvertedPrompt]]:
    """Yield the prompts of a problem's images, batch by batch.

    A smaller last batch is filled with copies of its last image. The last bits of a row may depend on the batch size,
    and all batches then have the same size.

    Args:
        whole: All images.
        inverter: A row of ``INVERTERS``.
        settings: The inverter's settings.
        batch_size: The number of images in a batch.
        selection: How to choose among an image's candidates.
        advance: Called after each evaluation.
    """
    for start in range(0, len(whole.ids), batch_size):
        ids = whole.ids[start : start + batch_size]
        rows = [min(start + row, len(whole.ids) - 1) for row in range(batch_size)]
        part = replace(whole, images=whole.images[rows], ids=tuple(whole.ids[row] for row in rows))
        with on_device(whole.model.text_encoders(), whole.model.device):
            candidates = inverter.run(part, settings, advance)
        prompts, similarities = choose(part, candidates, selection)
        yield [
            InvertedPrompt(name, prompt, tuple(dict.fromkeys(texts)), similarity)
            for name, prompt, texts, similarity in zip(ids, prompts, candidates, similarities, strict=False)
        ]


def choose(
    problem: InversionProblem, candidates: Sequence[Sequence[str]], selection: SelectionSettings
) -> tuple[list[str], list[float | None]]:
    """Return for each image the candidate with the most similar generated images, and this similarity.

    All candidates of an image start from the same noise. No later measurement uses this noise.

    Raises:
        DdilError: images have several candidates, and CLIP's image tower is missing or gives NaN.
    """
    if len(candidates[0]) == 1:
        return [only for (only,) in candidates], [None] * len(candidates)
    if problem.towers is None:
        raise DdilError(
            f"candidate prompts cannot be compared by their images: {missing_towers(None)}, or make one candidate"
        )
    table = np.zeros((len(candidates), len(candidates[0])))
    for number in range(selection.images):
        samples = [Sample(f"{name}/choosing", number) for name in problem.ids]
        for column, texts in enumerate(zip(*candidates, strict=True)):
            images = sample_images(problem.model, samples, texts, selection.sampling, problem.seed)
            table[:, column] += problem.towers.similarity(images, problem.images) / selection.images
    best = table.argmax(axis=1)
    rows = range(len(best))
    return [candidates[row][best[row]] for row in rows], [float(table[row, best[row]]) for row in rows]
