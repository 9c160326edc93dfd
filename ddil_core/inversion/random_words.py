"""The baseline: random words, which do not depend on the image."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from ddil_core.inversion.problem import Candidates, InversionProblem, Inverter
from ddil_core.support.protocol import Strict


class RandomSettings(Strict):
    """Settings of random prompts.

    Attributes:
        tokens: The number of words in a prompt.
    """

    tokens: int = Field(default=15, ge=1)


def random_words(problem: InversionProblem, settings: RandomSettings, advance: Callable[[], None]) -> Candidates:
    """Return one candidate for each image: words drawn with equal probability."""
    problem.words.require(settings.tokens)
    advance()
    return [[text] for text in problem.words.texts(problem.words.draw(settings.tokens, problem.generators("random")))]


RANDOM = Inverter(
    name="random",
    title="words at random",
    settings=RandomSettings,
    run=random_words,
    evaluations=lambda settings: 1,
    source="the floor",
    needs_towers=lambda settings: False,
)
