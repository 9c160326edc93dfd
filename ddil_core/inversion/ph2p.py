"""PH2P: the prompt whose words predict a picture's noise best (Mahajan et al., 2312.12416).

At timesteps where the prompt matters most, the network's ε is compared with the noise that was added. Continuous vectors e are
kept; the loss and its gradient are found at the nearest words, and the gradient steps e ("delayed projection"), so that small
steps add up until another word is nearer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from ddil_core.denoiser import GuidedDenoiser
from ddil_core.inversion.lbfgs import BatchedLBFGS
from ddil_core.inversion.problem import Candidates, Inverter, Problem, transposed
from ddil_core.inversion.words import encode
from ddil_core.parameterization import to_eps
from ddil_core.protocol import Strict


class PH2PSettings(Strict):
    """``rounds`` of L-BFGS with ``evaluations`` each; a round has timesteps and noise of its own, ``draws`` of them a picture, and
    ends in a candidate. ``first_step`` is the length of a round's first step in units of the words' spacing."""

    tokens: int = Field(default=15, ge=1)
    rounds: int = Field(default=25, ge=1)
    evaluations: int = Field(default=20, ge=1)
    learning_rate: float = Field(default=0.8, gt=0)
    first_step: float = Field(default=1.0, gt=0)
    history: int = Field(default=10, ge=1)
    draws: int = Field(default=1, ge=1)
    t_low: int = Field(default=500, ge=1)
    t_high: int = Field(default=899, ge=1)


def noised(
    x0: Tensor, problem: Problem, generators: list[torch.Generator], settings: PH2PSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, ε, t) of ``draws`` for each picture, [B · draws, …], drawn by its own generator on the CPU."""
    draws, span = settings.draws, settings.t_high - settings.t_low + 1
    t = torch.cat([settings.t_low + torch.randint(span, (draws,), generator=one) for one in generators]).to(x0.device)
    eps = torch.cat([torch.randn((draws, *x0.shape[1:]), generator=one) for one in generators]).to(x0.device)
    return problem.model.denoiser.schedule.add_noise(x0.repeat_interleave(draws, dim=0), eps, t), eps, t


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
    """Candidates: the words nearest to e after each round."""
    words = problem.words
    words.require(settings.tokens)
    generators = problem.generators("ph2p")
    e = words.table[words.draw(settings.tokens, generators)]
    x0, denoiser = problem.latents(), problem.model.guided(1.0)
    optimiser = BatchedLBFGS(settings.learning_rate, settings.history, settings.first_step * words.spacing)
    found = []
    for _ in range(settings.rounds):
        z, eps, t = noised(x0, problem, generators, settings)
        optimiser.forget()
        for _ in range(settings.evaluations):
            _, gradient = loss_and_gradient(problem, denoiser, words.table[words.nearest(e)], z, eps, t)
            e = e + optimiser.step(gradient.flatten(1).float()).view_as(e)
            advance()
        found.append(words.texts(words.nearest(e)))
    return transposed(found)


PH2P = Inverter(
    name="ph2p",
    title="PH2P: denoising loss at t = 500 … 899, delayed projection",
    settings=PH2PSettings,
    run=ph2p,
    evaluations=lambda settings: settings.rounds * settings.evaluations,
    needs_towers=False,
    source="Mahajan et al., 2312.12416",
)
