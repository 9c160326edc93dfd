"""Many pictures at once: batches of one size, the inverter's candidates, and the winner among them by its picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
    """How the model draws what a prompt is chosen by, and how many pictures of each candidate (PH2P's authors: one)."""

    sampling: Sampling
    pictures: int = 1


@dataclass(frozen=True)
class InvertedPrompt:
    """A picture's prompt; ``similarity`` is the mean cosine, by CLIP's image tower, of what the model draws from it with the
    picture, where there was something to choose. ``candidates`` are all prompts that it was chosen from."""

    id: str
    prompt: str
    candidates: tuple[str, ...]
    similarity: float | None = None


def invert(
    whole: InversionProblem,
    inverter: Inverter,
    settings: Strict,
    batch_size: int,
    choosing: SelectionSettings,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[list[InvertedPrompt]]:
    """The prompts of a problem's pictures, batch by batch.

    A smaller batch is filled up with repetitions of its last picture: a row's arithmetic may depend on the batch's size in its
    last bits, and so on nothing else.
    """
    for start in range(0, len(whole.ids), batch_size):
        ids = whole.ids[start : start + batch_size]
        rows = [min(start + row, len(whole.ids) - 1) for row in range(batch_size)]
        part = replace(whole, images=whole.images[rows], ids=tuple(whole.ids[row] for row in rows))
        with on_device(whole.model.text_encoders(), whole.model.device):
            candidates = inverter.run(part, settings, advance)
        prompts, similarities = choose(part, candidates, choosing)
        yield [
            InvertedPrompt(name, prompt, tuple(dict.fromkeys(among)), similarity)
            for name, prompt, among, similarity in zip(ids, prompts, candidates, similarities, strict=False)
        ]


def choose(
    problem: InversionProblem, candidates: Sequence[Sequence[str]], choosing: SelectionSettings
) -> tuple[list[str], list[float | None]]:
    """For each picture the candidate whose pictures are most similar to it, and how similar they are.

    All candidates of a picture are drawn from the same noise, which nothing that is measured later is drawn from.

    Raises:
        DdilError: there is something to choose, and no image tower to choose by, or one that gives NaN.
    """
    if len(candidates[0]) == 1:
        return [only for (only,) in candidates], [None] * len(candidates)
    if problem.towers is None:
        raise DdilError(f"prompts cannot be chosen by their pictures: {missing_towers(None)}")
    table = np.zeros((len(candidates), len(candidates[0])))
    for number in range(choosing.pictures):
        samples = [Sample(f"{name}/choosing", number) for name in problem.ids]
        for place, texts in enumerate(zip(*candidates, strict=True)):
            pictures = sample_images(problem.model, samples, texts, choosing.sampling, problem.seed)
            table[:, place] += problem.towers.similarity(pictures, problem.images) / choosing.pictures
    best = table.argmax(axis=1)
    rows = range(len(best))
    return [candidates[row][best[row]] for row in rows], [float(table[row, best[row]]) for row in rows]
