"""The exchange of single words: on losses in closed form, in PH2P, and from a caption with one wrong word."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_core.data.datasets import open_data
from ddil_core.inversion import INVERTERS, InversionProblem
from ddil_core.inversion.exchange import GRADIENT_COST, ExchangeSettings, Objective, exchange_words
from ddil_core.inversion.ph2p import PH2PSettings, exchanged, judging_losses, judging_noise, ph2p
from ddil_core.inversion.words import model_words
from ddil_core.models.model import Model, load_model
from ddil_core.shapes.training.architecture import caption_words

WORDS, PLACES, ROWS = 12, 5, 3


def nothing() -> None:
    """No progress to be shown."""


@dataclass
class Distances:
    """Squared distances of a prompt's vectors from targets: of each draw, the true ones with noise."""

    noise: float = 0.0
    spent: int = 0
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(WORDS, 4, generator=generator)
        self.truth = torch.randint(WORDS, (ROWS, PLACES), generator=generator)
        self.targets = self.table[self.truth] + self.noise * torch.randn(4, ROWS, PLACES, 4, generator=generator)

    def loss(self, index: Tensor, draws: int) -> Tensor:
        self.spent += draws
        return (self.table[index] - self.targets[:draws]).square().sum((2, 3)).mean(0)

    def gradient(self, index: Tensor) -> Tensor:
        self.spent += GRADIENT_COST * len(self.targets)
        return 2 * (self.table[index] - self.targets).mean(0)

    @property
    def objective(self) -> Objective:
        return Objective(self.loss, self.gradient, self.table)


@pytest.mark.parametrize("candidates", [None, 4])
def test_no_exchange_raises_the_loss_and_the_best_words_are_found(candidates: int | None) -> None:
    start = torch.zeros(ROWS, PLACES, dtype=torch.long)
    before = Distances(noise=0.3).loss(start, 4)
    losses = [before]
    for sweeps in (1, 2, 3):
        world = Distances(noise=0.3)
        index, found = exchange_words(
            world.objective, start, ExchangeSettings(candidates=candidates, sweeps=sweeps), nothing
        )
        assert torch.allclose(found, world.loss(index, 4))
        losses.append(found)
    assert all(bool((after <= earlier).all()) for earlier, after in pairwise(losses))
    assert bool((losses[1] < before).all())
    exact = Distances()
    index, _ = exchange_words(exact.objective, start, ExchangeSettings(candidates=candidates, finalists=4), nothing)
    if candidates is None:  # a ranking by the gradient may miss the best word
        assert torch.equal(index, exact.truth)


def test_the_gradient_ranks_the_words_that_are_tried() -> None:
    """To first order, a word w at a place with the vector e and the gradient g changes the loss by g · (w − e)."""
    world, start = Distances(noise=0.3), torch.zeros(ROWS, PLACES, dtype=torch.long)
    tried: list[Tensor] = []

    def loss(index: Tensor, draws: int) -> Tensor:
        if draws == 1 and not torch.equal(index[:, 1:], start[:, 1:]):
            raise AssertionError("only the first place is exchanged within this budget")
        tried.extend([index[:, 0]] if draws == 1 else [])
        return world.loss(index, draws)

    objective = Objective(loss, world.gradient, world.table)
    exchange_words(objective, start, ExchangeSettings(candidates=3, evaluations=4 + 3 + 2 * 4 + 3 * 4), nothing)
    changes = torch.einsum("bd,wd->bw", world.gradient(start)[:, 0], world.table - world.table[0])
    expected = changes.argsort(dim=1)[:, :3]
    assert torch.equal(torch.stack(tried, dim=1).sort(dim=1).values, expected.sort(dim=1).values)
    assert not torch.equal(expected, expected[:1].expand(ROWS, -1))  # the rows differ, and so the gradient counts


def test_the_budget_is_kept_and_the_search_ends_where_no_exchange_helps() -> None:
    start = torch.zeros(ROWS, PLACES, dtype=torch.long)
    cost = WORDS + 2 * 4
    for budget, places in ((4 + cost - 1, 0), (4 + 2 * cost, 2), (4 + 3 * cost - 1, 2)):
        world = Distances()
        index, _ = exchange_words(
            world.objective, start, ExchangeSettings(candidates=None, evaluations=budget), nothing
        )
        assert world.spent == 4 + places * cost <= budget
        assert torch.equal(index[:, places:], start[:, places:])
    world, calls = Distances(), list[None]()
    exchange_words(
        world.objective, world.truth, ExchangeSettings(candidates=None, sweeps=7, evaluations=10_000),
        lambda: calls.append(None),
    )  # fmt: skip
    assert world.spent == 4 + PLACES * cost and len(calls) == 7 * PLACES


def test_ph2p_exchanges_words_of_its_best_candidate(model: Model) -> None:
    data = open_data("shapes")
    ids = tuple(prompt.id for prompt in data.prompts(2))
    problem = InversionProblem(model, model_words(model, tuple(caption_words())), next(data.images(2)), ids, 0)
    once = {"tokens": 4, "rounds": 2, "evaluations": 2, "candidates": 2, "radius": 4.0, "judging": 2}
    without = ph2p(problem, PH2PSettings.model_validate(once), nothing)
    settings = PH2PSettings.model_validate({**once, "exchange": {"candidates": 5, "draws": 2, "sweeps": 1}})
    calls = list[None]()
    found = ph2p(problem, settings, lambda: calls.append(None))
    assert [len(candidates) for candidates in found] == [1, 1]  # so that no image tower is needed
    assert not INVERTERS["ph2p"].needs_towers(settings)
    assert len(calls) == INVERTERS["ph2p"].evaluations(settings) == 2 * 2 + 4
    noise = judging_noise(problem.latents(), problem, settings, "ph2p exchange")

    def losses(texts: list[str]) -> Tensor:
        index = torch.tensor([[problem.words.words.index(word) for word in text.split()] for text in texts])
        return judging_losses(problem, model.guided(1.0), index, noise)

    start = ph2p(problem, settings.model_copy(update={"exchange": ExchangeSettings(evaluations=1)}), nothing)
    assert all(one[0] in candidates for one, candidates in zip(start, without, strict=True))
    assert bool((losses([one[0] for one in found]) < losses([one[0] for one in start])).all())


@pytest.mark.weights
def test_the_word_that_a_caption_lacks_is_found() -> None:
    """From the true caption with another colour or shape, four places of the exchange undo most of the damage."""
    teacher, data = load_model("shapes"), open_data("shapes")
    prompts = data.prompts(2)
    problem = InversionProblem(
        teacher, model_words(teacher, tuple(caption_words())), np.concatenate(list(data.images(2))),
        tuple(prompt.id for prompt in prompts), 0,
    )  # fmt: skip
    words = problem.words.words
    truth = torch.tensor([[words.index(word) for word in prompt.text.split()] for prompt in prompts])
    wrong = truth.clone()
    for row, (place, word) in enumerate(((2, "purple"), (3, "star"))):
        assert word not in prompts[row].text
        wrong[row, place] = words.index(word)
    chosen = ExchangeSettings(candidates=None, draws=4, evaluations=4 + 4 * (len(words) + 2 * 4))
    settings = PH2PSettings(tokens=truth.shape[1], exchange=chosen)
    denoiser, x0 = teacher.guided(1.0), problem.latents()
    found = exchanged(problem, denoiser, settings, x0, wrong, nothing)
    held_out = judging_noise(x0, problem, settings.model_copy(update={"judging": 4}), "held out")
    before, after = (judging_losses(problem, denoiser, index, held_out) for index in (wrong, found))
    assert bool((after < 0.75 * before).all())
    assert int(found[0, 2]) == int(truth[0, 2])  # the colour stands in its place again
    assert torch.equal(found[:, 4:], truth[:, 4:])
