"""PEZ: find the prompt with the largest CLIP cosine to an image, without a diffusion model (Wen et al., 2302.03668)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field

from ddil_core.inversion.problem import Best, Candidates, InversionProblem, Inverter
from ddil_core.inversion.towers import missing_towers
from ddil_core.support.errors import DdilError
from ddil_core.support.protocol import Strict


class PEZSettings(Strict):
    """Settings of AdamW on continuous vectors; the loss and its gradient are taken at the nearest words by cosine.

    Attributes:
        tokens: The number of words in a prompt.
        iterations: The number of updates.
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's weight decay.
    """

    tokens: int = Field(default=16, ge=1)
    iterations: int = Field(default=3000, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)


def pez(problem: InversionProblem, settings: PEZSettings, advance: Callable[[], None]) -> Candidates:
    """Return one candidate for each image: of all iterations, the words with the largest cosine to the image."""
    towers, words = problem.towers, problem.tower_words
    if towers is None or words is None:
        raise DdilError(f"the inverter 'pez' cannot run: {missing_towers(None)}")
    words.require(settings.tokens)
    with torch.no_grad():
        target = towers.encode_images(problem.images)
    e = words.table[words.draw(settings.tokens, problem.generators("pez"))].requires_grad_()
    # AdamW updates each entry by itself, so that the rows stay independent.
    optimiser = torch.optim.AdamW([e], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best = Best()
    for _ in range(settings.iterations):
        index = words.nearest(e.detach(), cosine=True)
        leaf = words.table[index].requires_grad_()
        with torch.enable_grad(), words.reading(leaf) as prompts:
            cosines = (towers.encode_texts(prompts) * target).sum(-1)
            e.grad = torch.autograd.grad((1 - cosines).sum(), leaf)[0]
        best.update(-cosines.detach(), index)
        optimiser.step()
        advance()
    return [[text] for text in words.texts(best.index)]


PEZ = Inverter(
    name="pez",
    title="PEZ: CLIP's image-text cosine, projection by cosine",
    settings=PEZSettings,
    run=pez,
    evaluations=lambda settings: settings.iterations,
    source="Wen et al., 2302.03668",
)
