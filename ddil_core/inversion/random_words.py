"""The floor: words at random, that know nothing of the picture."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from ddil_core.inversion.problem import Candidates, InversionProblem, Inverter
from ddil_core.support.protocol import Strict


class RandomSettings(Strict):
    """How many words."""

    tokens: int = Field(default=15, ge=1)


def random_words(problem: InversionProblem, settings: RandomSettings, advance: Callable[[], None]) -> Candidates:
    """One candidate: words drawn alike."""
    problem.words.require(settings.tokens)
    advance()
    return [[text] for text in problem.words.texts(problem.words.draw(settings.tokens, problem.generators("random")))]


RANDOM = Inverter(
    name="random",
    title="words at random",
    settings=RandomSettings,
    run=random_words,
    evaluations=lambda settings: 1,
    needs_towers=False,
    source="the floor",
)
