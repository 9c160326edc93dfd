"""PH2P: find the prompt that best predicts the noise of an image (Mahajan et al., 2312.12416).

At timesteps where the prompt matters most, the loss compares the network's ε with the noise that was added. The search
keeps continuous vectors e. It computes the loss and its gradient at the words nearest to e, and the gradient moves e
("delayed projection"). Small steps add up until another word is nearer.

The loss depends far more on t than on the prompt. Losses of different timesteps and noise are therefore not
comparable. All prompts of one round share timesteps and noise. The best prompts of several rounds are compared on
common noise, which is the same for every prompt of an image.

The authors stop there. With ``exchange`` the best prompt of all rounds is the start of a second search, which exchanges
single words under the same loss (``exchange.py``).
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
from ddil_core.inversion.exchange import ExchangeSettings, Objective, exchange_words
from ddil_core.inversion.lbfgs import BatchedLBFGS
from ddil_core.inversion.problem import Best, Candidates, InversionProblem, Inverter, transposed
from ddil_core.inversion.words import Words, encode
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import Strict


class PH2PSettings(Strict):
    """Settings of PH2P.

    Attributes:
        tokens: The number of words in a prompt.
        start: The first words of the starting prompt; the others are random. The authors' code starts from
            "A photo of bus of color .".
        searches: The number of searches, each on other noise.
        rounds: The number of L-BFGS runs in a search. Each round has timesteps and noise of its own.
        evaluations: The number of losses and gradients in a round.
        learning_rate: The learning rate of L-BFGS.
        radius: No step is longer than ``learning_rate`` times ``radius``. The unit is the spacing of the words.
        history: The number of pairs that L-BFGS remembers.
        draws: The number of (timestep, noise) pairs for each image in a round.
        candidates: A search splits its rounds into this many equal stretches. Each stretch gives one candidate: the
            best prompt of its rounds by the loss on common noise.
        judging: The number of (timestep, noise) pairs of the common noise.
        t_low: The first timestep that may be drawn.
        t_high: The last timestep that may be drawn.
        exchange: How words of the best candidate by the loss on common noise are exchanged. It is then the only
            candidate. None: not at all, as in the authors' code.
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
    exchange: ExchangeSettings | None = None

    @model_validator(mode="after")
    def _fits(self) -> PH2PSettings:
        if self.t_low > self.t_high:
            raise ValueError(f"t_low is {self.t_low}, above t_high, which is {self.t_high}")
        if self.candidates > self.rounds:
            raise ValueError(
                f"there are {self.candidates} candidates and only {self.rounds} rounds; each candidate needs a round"
            )
        return self

    @property
    def stretches(self) -> list[int]:
        """The number of rounds behind each candidate of a search."""
        ends = [self.rounds * place // self.candidates for place in range(self.candidates + 1)]
        return [end - start for start, end in pairwise(ends)]


Noise = tuple[Tensor, Tensor, Tensor]
"""(z_t, ε, t), each [B, …]."""


@dataclass(frozen=True, eq=False)
class Round:
    """The result of a round.

    Attributes:
        index: The words of the lowest loss, int64 [B, K].
        losses: The lowest losses on the round's own noise, [B].
        t: The round's timesteps, [B, draws].
    """

    index: Tensor
    losses: Tensor
    t: Tensor


def draw_noise(
    x0: Tensor, problem: InversionProblem, generators: list[torch.Generator], settings: PH2PSettings
) -> Noise:
    """Draw (z_t, ε, t), each [B · draws, …]. Each image's own generator draws them on the CPU."""
    draws, span = settings.draws, settings.t_high - settings.t_low + 1
    t = torch.cat([settings.t_low + torch.randint(span, (draws,), generator=g) for g in generators]).to(x0.device)
    eps = torch.cat([torch.randn((draws, *x0.shape[1:]), generator=g) for g in generators]).to(x0.device)
    return problem.model.denoiser.schedule.add_noise(x0.repeat_interleave(draws, dim=0), eps, t), eps, t


def judging_noise(
    x0: Tensor, problem: InversionProblem, settings: PH2PSettings, purpose: str = "ph2p judging"
) -> list[Noise]:
    """Return the common noise of all prompts of an image: ``judging`` draws, each for the whole batch.

    The range t_low … t_high is split into ``judging`` equal parts, and the j-th draw takes t from the j-th part. The
    draws depend on the image's id, the seed and ``purpose`` alone.
    """
    count, span = settings.judging, settings.t_high - settings.t_low + 1
    generators = problem.generators(purpose)
    draws = []
    for part in range(count):
        uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        t = settings.t_low + ((part + uniform) * span / count).long().clamp(max=span - 1)
        eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
        t, eps = t.to(x0.device), eps.to(x0.device)
        draws.append((problem.model.denoiser.schedule.add_noise(x0, eps, t), eps, t))
    return draws


def starting_words(drawn: Tensor, words: Words, start: str | None) -> Tensor:
    """Return drawn words [B, K] with the words of ``start`` in the first places.

    Raises:
        WrongCommand: a prompt may not hold a word of ``start``, or ``start`` is longer than a prompt.
    """
    first = [] if start is None else [w if w in words.words else w.lower() for w in start.split()]
    absent = [word for word in first if word not in words.words]
    if absent:
        raise WrongCommand(f"'start' has the word {absent[0]!r}, which a prompt may not hold; leave the word out")
    if len(first) > drawn.shape[1]:
        raise WrongCommand(
            f"'start' has {len(first)} words, and a prompt has only {drawn.shape[1]} tokens; "
            "shorten 'start' or set more tokens"
        )
    index = torch.tensor([words.words.index(word) for word in first], dtype=torch.long, device=drawn.device)
    return torch.cat([index.expand(len(drawn), -1), drawn[:, len(first) :]], dim=1)


def noise_errors(denoiser: GuidedDenoiser, condition: Condition, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return the mean squared error of ε̂, [B].

    Args:
        denoiser: The model's denoiser at guidance scale 1.
        condition: The conditions of B rows.
        z: The states α x₀ + σ ε, [B, C, H, W].
        eps: The true noise, [B, C, H, W].
        t: The timesteps, int64 [B].
    """
    x0 = denoiser(z, t, condition)
    return (to_eps(x0, z, *denoiser.schedule.at(t, z)) - eps).square().flatten(1).mean(1)


def loss_and_gradient(
    problem: InversionProblem, denoiser: GuidedDenoiser, vectors: Tensor, z: Tensor, eps: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each image's mean squared error of ε̂, [B], and the gradient with respect to its vectors, [B, K, D].

    Args:
        problem: The images; the model encodes the vectors.
        denoiser: The model's denoiser at guidance scale 1.
        vectors: The prompts' vectors, [B, K, D].
        z: Noisy latents, [B · draws, C, h, w]; the draws of an image follow each other.
        eps: The noise in ``z``, of the same shape.
        t: The timesteps, [B · draws].
    """
    rows = torch.arange(len(vectors), device=z.device).repeat_interleave(len(z) // len(vectors))
    with torch.enable_grad():
        leaf = vectors.detach().requires_grad_()
        condition = encode(problem.model, problem.words, leaf).rows(rows)
        losses = noise_errors(denoiser, condition, z, eps, t).view(len(vectors), -1).mean(1)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@torch.no_grad()
def judging_losses(problem: InversionProblem, denoiser: GuidedDenoiser, index: Tensor, noise: list[Noise]) -> Tensor:
    """Return the mean loss [B] of words int64 [B, K] on common noise. One draw at a time keeps memory constant."""
    condition = encode(problem.model, problem.words, problem.words.table[index])
    return torch.stack([noise_errors(denoiser, condition, *draw) for draw in noise]).mean(0)


def ph2p(problem: InversionProblem, settings: PH2PSettings, advance: Callable[[], None]) -> Candidates:
    """Return a candidate for each search and each stretch of its rounds."""
    problem.words.require(settings.tokens)
    span = [settings.t_high, settings.t_low] if settings.t_high > settings.t_low else [settings.t_high]
    problem.model.denoiser.schedule.require_inside(span, "the range of t_low and t_high")
    denoiser, x0 = problem.model.guided(1.0), problem.latents()
    generators, noise = problem.generators("ph2p"), judging_noise(x0, problem, settings)
    found = []
    for _ in range(settings.searches):
        rounds = search(problem, denoiser, settings, x0, generators, advance)
        for size in settings.stretches:
            indices = [one.index for one in islice(rounds, size)]
            found.append(winner(problem, denoiser, indices, noise))
    if settings.exchange is None:
        return transposed([problem.words.texts(index) for index in found])
    best = winner(problem, denoiser, found, noise)
    return [[text] for text in problem.words.texts(exchanged(problem, denoiser, settings, x0, best, advance))]


def exchanged(
    problem: InversionProblem,
    denoiser: GuidedDenoiser,
    settings: PH2PSettings,
    x0: Tensor,
    index: Tensor,
    advance: Callable[[], None],
) -> Tensor:
    """Return words int64 [B, K] after the exchange of single words. Its noise is common to all prompts of an image."""
    chosen = settings.exchange
    assert chosen is not None, "the settings ask for an exchange"
    noise = judging_noise(x0, problem, settings.model_copy(update={"judging": chosen.draws}), "ph2p exchange")
    noise = noise[chosen.draws // 2 :] + noise[: chosen.draws // 2]  # the first pair screens: one amid the timesteps

    def gradient(index: Tensor) -> Tensor:
        vectors = problem.words.table[index]
        return torch.stack([loss_and_gradient(problem, denoiser, vectors, *draw)[1] for draw in noise]).mean(0)

    def loss(index: Tensor, draws: int) -> Tensor:
        return judging_losses(problem, denoiser, index, noise[:draws])

    objective = Objective(loss, gradient, problem.words.table)
    return exchange_words(objective, index, chosen, advance)[0]


def search(
    problem: InversionProblem,
    denoiser: GuidedDenoiser,
    settings: PH2PSettings,
    x0: Tensor,
    generators: list[torch.Generator],
    advance: Callable[[], None],
) -> Iterator[Round]:
    """Yield the rounds of one search.

    Args:
        problem: The images.
        denoiser: The model's denoiser at guidance scale 1.
        settings: PH2P's settings.
        x0: The images' latents, [B, C, h, w].
        generators: A random generator for each image. The search advances them.
        advance: Called after each evaluation.
    """
    words = problem.words
    e = words.table[starting_words(words.draw(settings.tokens, generators), words, settings.start)]
    optimiser = BatchedLBFGS(settings.learning_rate, settings.history, settings.radius * words.spacing)
    for _ in range(settings.rounds):
        z, eps, t = draw_noise(x0, problem, generators, settings)
        optimiser.reset()
        best = Best()
        for _ in range(settings.evaluations):
            index = words.nearest(e)
            losses, gradient = loss_and_gradient(problem, denoiser, words.table[index], z, eps, t)
            best.update(losses, index)
            e = e + optimiser.step(gradient.flatten(1).float()).view_as(e)
            advance()
        yield Round(best.index, best.losses, t.view(len(x0), -1))


def winner(problem: InversionProblem, denoiser: GuidedDenoiser, prompts: list[Tensor], noise: list[Noise]) -> Tensor:
    """Return for each image the words int64 [B, K] with the lowest loss on common noise, of several prompts [B, K]."""
    if len(prompts) == 1:
        return prompts[0]
    best = Best()
    for index in prompts:
        best.update(judging_losses(problem, denoiser, index, noise), index)
    return best.index


def _evaluations(settings: PH2PSettings) -> int:
    """Return the number of losses with gradients, and of places at which words are exchanged."""
    exchanged = 0 if settings.exchange is None else settings.exchange.sweeps * settings.tokens
    return settings.searches * settings.rounds * settings.evaluations + exchanged


PH2P = Inverter(
    name="ph2p",
    title="PH2P: denoising loss at t = 500 … 899, delayed projection",
    settings=PH2PSettings,
    run=ph2p,
    evaluations=_evaluations,
    source="Mahajan et al., 2312.12416",
    needs_towers=lambda settings: settings.exchange is None and settings.searches * settings.candidates > 1,
)
