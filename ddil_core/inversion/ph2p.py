"""PH2P: the prompt whose words predict a picture's noise best (Mahajan et al., 2312.12416).

At timesteps where the prompt matters most, the network's ε is compared with the noise that was added. Continuous vectors e are
kept; the loss and its gradient are found at the nearest words, and the gradient steps e ("delayed projection"), so that small
steps add up until another word is nearer.

The loss depends far more on t than on the prompt, so that losses of different timesteps and noise cannot be compared. Prompts of
one round share theirs; the best prompts of several rounds are compared on noise that is the same for every prompt of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser
from ddil_core.diffusion.parameterization import to_eps
from ddil_core.inversion.lbfgs import BatchedLBFGS
from ddil_core.inversion.problem import Best, Candidates, InversionProblem, Inverter, transposed
from ddil_core.inversion.words import Words, encode
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import Strict


class PH2PSettings(Strict):
    """``rounds`` of L-BFGS with ``evaluations`` each; a round has timesteps and noise of its own, ``draws`` of them a picture.

    No step is longer than ``learning_rate`` times ``radius``, which is in units of the words' spacing. Words of ``start`` come
    first in the prompt that is begun with (the authors' code has "A photo of bus of color ."), the others are drawn. ``searches``
    begin anew, on other noise. A search's rounds are split into ``candidates`` equal stretches, and each stretch gives one
    candidate: the round's best prompt or, of several rounds, the one whose loss is lowest on ``judging`` timesteps and noises that
    all prompts of a picture are judged on.
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
    judging: int = Field(default=8, ge=1)
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

    @property
    def stretches(self) -> list[int]:
        """The number of rounds that each candidate of a search is chosen from."""
        ends = [self.rounds * place // self.candidates for place in range(self.candidates + 1)]
        return [end - start for start, end in pairwise(ends)]


Noise = tuple[Tensor, Tensor, Tensor]
"""(z_t, ε, t), each [B, …]."""


@dataclass(frozen=True, eq=False)
class Round:
    """What a round found: the words int64 [B, K] of its lowest loss [B], which is of its own timesteps ``t`` [B, draws]."""

    index: Tensor
    losses: Tensor
    t: Tensor


def noised(x0: Tensor, problem: InversionProblem, generators: list[torch.Generator], settings: PH2PSettings) -> Noise:
    """(z_t, ε, t) of ``draws`` for each picture, [B · draws, …], drawn by its own generator on the CPU."""
    draws, span = settings.draws, settings.t_high - settings.t_low + 1
    t = torch.cat([settings.t_low + torch.randint(span, (draws,), generator=one) for one in generators]).to(x0.device)
    eps = torch.cat([torch.randn((draws, *x0.shape[1:]), generator=one) for one in generators]).to(x0.device)
    return problem.model.denoiser.schedule.add_noise(x0.repeat_interleave(draws, dim=0), eps, t), eps, t


def judging_noise(
    x0: Tensor, problem: InversionProblem, settings: PH2PSettings, purpose: str = "ph2p judging"
) -> list[Noise]:
    """What all prompts of a picture are judged on: ``judging`` draws, each for the whole batch.

    The j-th t is drawn from the j-th of as many equal parts of t_low … t_high. All of it depends on the picture's id, the seed and
    ``purpose`` alone.
    """
    count, span = settings.judging, settings.t_high - settings.t_low + 1
    generators = problem.generators(purpose)
    draws = []
    for part in range(count):
        uniform = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in generators])
        t = settings.t_low + ((part + uniform) * span / count).long().clamp(max=span - 1)
        eps = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in generators])
        t, eps = t.to(x0.device), eps.to(x0.device)
        draws.append((problem.model.denoiser.schedule.add_noise(x0, eps, t), eps, t))
    return draws


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


def noise_errors(denoiser: GuidedDenoiser, condition: Condition, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The mean squared error of ε̂ [B]."""
    x0 = denoiser(z, t, condition)
    return (to_eps(x0, z, *denoiser.schedule.at(t, z)) - eps).square().flatten(1).mean(1)


def loss_and_gradient(
    problem: InversionProblem, denoiser: GuidedDenoiser, vectors: Tensor, z: Tensor, eps: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Each picture's mean squared error of ε̂ [B], and its gradient with respect to its vectors [B, K, D]."""
    rows = torch.arange(len(vectors), device=z.device).repeat_interleave(len(z) // len(vectors))
    with torch.enable_grad():
        leaf = vectors.detach().requires_grad_()
        condition = encode(problem.model, problem.words, leaf).rows(rows)
        losses = noise_errors(denoiser, condition, z, eps, t).view(len(vectors), -1).mean(1)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@torch.no_grad()
def judged(problem: InversionProblem, denoiser: GuidedDenoiser, index: Tensor, noise: list[Noise]) -> Tensor:
    """The mean loss [B] of words int64 [B, K] over draws of noise, one draw at a time, so that memory does not grow with them."""
    condition = encode(problem.model, problem.words, problem.words.table[index])
    return torch.stack([noise_errors(denoiser, condition, *draw) for draw in noise]).mean(0)


def ph2p(problem: InversionProblem, settings: PH2PSettings, advance: Callable[[], None]) -> Candidates:
    """Candidates: one of each search and stretch of its rounds."""
    problem.words.require(settings.tokens)
    span = [settings.t_high, settings.t_low] if settings.t_high > settings.t_low else [settings.t_high]
    problem.model.denoiser.schedule.require_inside(span, "the range of t_low and t_high")
    denoiser, x0 = problem.model.guided(1.0), problem.latents()
    generators, noise = problem.generators("ph2p"), judging_noise(x0, problem, settings)
    found = []
    for _ in range(settings.searches):
        rounds = search(problem, denoiser, settings, x0, generators, advance)
        for size in settings.stretches:
            found.append(problem.words.texts(winners(problem, denoiser, list(islice(rounds, size)), noise)))
    return transposed(found)


def search(
    problem: InversionProblem,
    denoiser: GuidedDenoiser,
    settings: PH2PSettings,
    x0: Tensor,
    generators: list[torch.Generator],
    advance: Callable[[], None],
) -> Iterator[Round]:
    """The rounds of one search from the beginning."""
    words = problem.words
    e = words.table[begun(words.draw(settings.tokens, generators), words, settings.start)]
    optimiser = BatchedLBFGS(settings.learning_rate, settings.history, settings.radius * words.spacing)
    for _ in range(settings.rounds):
        z, eps, t = noised(x0, problem, generators, settings)
        optimiser.forget()
        best = Best()
        for _ in range(settings.evaluations):
            index = words.nearest(e)
            losses, gradient = loss_and_gradient(problem, denoiser, words.table[index], z, eps, t)
            best.see(losses, index)
            e = e + optimiser.step(gradient.flatten(1).float()).view_as(e)
            advance()
        yield Round(best.index, best.losses, t.view(len(x0), -1))


def winners(problem: InversionProblem, denoiser: GuidedDenoiser, rounds: list[Round], noise: list[Noise]) -> Tensor:
    """Of each picture's rounds the words int64 [B, K] whose loss on common noise is lowest; one round needs no judging."""
    if len(rounds) == 1:
        return rounds[0].index
    best = Best()
    for one in rounds:
        best.see(judged(problem, denoiser, one.index, noise), one.index)
    return best.index


PH2P = Inverter(
    name="ph2p",
    title="PH2P: denoising loss at t = 500 … 899, delayed projection",
    settings=PH2PSettings,
    run=ph2p,
    evaluations=lambda settings: settings.searches * settings.rounds * settings.evaluations,
    needs_towers=False,
    source="Mahajan et al., 2312.12416",
)
