"""PH2P: the prompt whose words predict a picture's noise best (Mahajan et al., 2312.12416).

At timesteps where the prompt matters most, the network's ε is compared with the noise that was added. Continuous vectors e are
kept; the loss and its gradient are found at the nearest words, and the gradient steps e ("delayed projection"), so that small
steps add up until another word is nearer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ddil_core.denoiser import GuidedDenoiser
from ddil_core.errors import WrongCommand
from ddil_core.inversion.lbfgs import BatchedLBFGS
from ddil_core.inversion.problem import Best, Candidates, Inverter, Problem, transposed
from ddil_core.inversion.words import Words, encode
from ddil_core.parameterization import to_eps
from ddil_core.protocol import Strict


class PH2PSettings(Strict):
    """``rounds`` of L-BFGS with ``evaluations`` each; a round has timesteps and noise of its own, ``draws`` of them a picture.

    No step is longer than ``learning_rate`` times ``radius``, which is in units of the words' spacing. Words of ``start`` come
    first in the prompt that is begun with (the authors' code has "A photo of bus of color ."), the others are drawn. Of each of
    ``candidates`` equal stretches of rounds the prompt of the lowest loss is a candidate. ``searches`` begin anew, on other noise.
    """

    tokens: int = Field(default=15, ge=1)
    start: str | None = None
    searches: int = Field(default=1, ge=1)
    rounds: int = Field(default=25, ge=1)
    evaluations: int = Field(default=20, ge=1)
    learning_rate: float = Field(default=0.8, gt=0)
    radius: float = Field(default=0.4, gt=0)
    history: int = Field(default=10, ge=1)
    draws: int = Field(default=1, ge=1)
    candidates: int = Field(default=8, ge=1)
    t_low: int = Field(default=500, ge=1)
    t_high: int = Field(default=899, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> PH2PSettings:
        if self.t_low > self.t_high:
            raise ValueError(f"t_low is {self.t_low}, above t_high, which is {self.t_high}")
        if self.candidates > self.rounds:
            raise ValueError(
                f"there are {self.candidates} candidates, more than the {self.rounds} rounds that they are from"
            )
        return self


def noised(
    x0: Tensor, problem: Problem, generators: list[torch.Generator], settings: PH2PSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, ε, t) of ``draws`` for each picture, [B · draws, …], drawn by its own generator on the CPU."""
    draws, span = settings.draws, settings.t_high - settings.t_low + 1
    t = torch.cat([settings.t_low + torch.randint(span, (draws,), generator=one) for one in generators]).to(x0.device)
    eps = torch.cat([torch.randn((draws, *x0.shape[1:]), generator=one) for one in generators]).to(x0.device)
    return problem.model.denoiser.schedule.add_noise(x0.repeat_interleave(draws, dim=0), eps, t), eps, t


def begun(drawn: Tensor, words: Words, start: str | None) -> Tensor:
    """Drawn words [B, K] with those of ``start`` in the first places.

    Raises:
        WrongCommand: one of them may not be chosen, or there are more of them than places.
    """
    told = [] if start is None else start.lower().split()
    absent = [word for word in told if word not in words.words]
    if absent:
        raise WrongCommand(f"the word {absent[0]!r} of 'start' is none of those that a prompt may have; leave it out")
    if len(told) > drawn.shape[1]:
        raise WrongCommand(f"'start' has {len(told)} words, more than the {drawn.shape[1]} tokens of a prompt")
    index = torch.tensor([words.words.index(word) for word in told], dtype=torch.long, device=drawn.device)
    return torch.cat([index.expand(len(drawn), -1), drawn[:, len(told) :]], dim=1)


def loss_and_gradient(
    problem: Problem, denoiser: GuidedDenoiser, vectors: Tensor, z: Tensor, eps: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Each picture's mean squared error of ε̂ [B], and its gradient with respect to its vectors [B, K, D]."""
    rows = torch.arange(len(vectors), device=z.device).repeat_interleave(len(z) // len(vectors))
    with torch.enable_grad():
        leaf = vectors.detach().requires_grad_()
        condition = encode(problem.model, problem.words, leaf).rows(rows)
        x0 = denoiser(z, t, condition)
        error = (to_eps(x0, z, *denoiser.schedule.at(t, z)) - eps).square().flatten(1).mean(1)
        losses = error.view(len(vectors), -1).mean(1)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def ph2p(problem: Problem, settings: PH2PSettings, advance: Callable[[], None]) -> Candidates:
    """Candidates: of each search and stretch of its rounds the prompt whose loss is lowest."""
    problem.words.require(settings.tokens)
    span = [settings.t_high, settings.t_low] if settings.t_high > settings.t_low else [settings.t_high]
    problem.model.denoiser.schedule.require_inside(span, "the range of t_low and t_high")
    generators = problem.generators("ph2p")
    x0 = problem.latents()
    searches = (search(problem, settings, x0, generators, advance) for _ in range(settings.searches))
    return transposed([prompts for found in searches for prompts in found])


def search(
    problem: Problem,
    settings: PH2PSettings,
    x0: Tensor,
    generators: list[torch.Generator],
    advance: Callable[[], None],
) -> list[list[str]]:
    """One search from the beginning: the candidates by stretch and picture."""
    words, denoiser = problem.words, problem.model.guided(1.0)
    e = words.table[begun(words.draw(settings.tokens, generators), words, settings.start)]
    optimiser = BatchedLBFGS(settings.learning_rate, settings.history, settings.radius * words.spacing)
    ends = {settings.rounds * (place + 1) // settings.candidates for place in range(settings.candidates)}
    best = Best()
    found = []
    for done in range(1, settings.rounds + 1):
        z, eps, t = noised(x0, problem, generators, settings)
        optimiser.forget()
        for _ in range(settings.evaluations):
            index = words.nearest(e)
            losses, gradient = loss_and_gradient(problem, denoiser, words.table[index], z, eps, t)
            best.see(losses, index)
            e = e + optimiser.step(gradient.flatten(1).float()).view_as(e)
            advance()
        if done in ends:
            found.append(words.texts(best.taken()))
    return found


PH2P = Inverter(
    name="ph2p",
    title="PH2P: denoising loss at t = 500 … 899, delayed projection",
    settings=PH2PSettings,
    run=ph2p,
    evaluations=lambda settings: settings.searches * settings.rounds * settings.evaluations,
    needs_towers=False,
    source="Mahajan et al., 2312.12416",
)
