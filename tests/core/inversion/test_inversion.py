"""Prompts of images: vectors in place of words, L-BFGS row by row, inverters, batches, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_core.data.datasets import open_data
from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.noise import Sample
from ddil_core.inversion import INVERTERS, InversionProblem, InvertedPrompt, SelectionSettings, get_inverter, invert
from ddil_core.inversion.invert import choose
from ddil_core.inversion.lbfgs import BatchedLBFGS
from ddil_core.inversion.pez import PEZSettings, pez
from ddil_core.inversion.ph2p import (
    Noise,
    PH2PSettings,
    Round,
    draw_noise,
    judging_losses,
    judging_noise,
    loss_and_gradient,
    ph2p,
    search,
    starting_words,
    winner,
)
from ddil_core.inversion.problem import Best
from ddil_core.inversion.random_words import RandomSettings, random_words
from ddil_core.inversion.towers import Towers, load_inversion_towers
from ddil_core.inversion.words import Words, encode, gather_words, model_words
from ddil_core.models.generate import resolve_sampling, sample_images
from ddil_core.models.model import Model, load_model
from ddil_core.shapes.training.architecture import MAX_TOKENS, caption_words, write_tokenizer
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance
from tests.pipelines import save_pipeline

LAYOUTS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
CAPTION = "a small red circle left of a large blue star on a grey background"


def nothing() -> None:
    """No progress to be shown."""


@pytest.fixture(scope="module", params=LAYOUTS)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("layout")
    return load_model(str(save_pipeline(folder, None, seed=1, layout=request.param, prediction="epsilon")))


@pytest.fixture(scope="module")
def towers() -> Towers:
    return load_inversion_towers("shapes")


@pytest.fixture(scope="module")
def problem(model: Model, towers: Towers) -> InversionProblem:
    """Three images on the tiny pipeline."""
    allowed = tuple(caption_words())
    images = next(open_data("shapes").images(3))
    ids = tuple(prompt.id for prompt in open_data("shapes").prompts(3))
    return InversionProblem(model, model_words(model, allowed), images, ids, 0, towers, towers.words(allowed))


def indices(known: Words, text: str) -> Tensor:
    return torch.tensor([[known.words.index(word) for word in text.split()]])


# L-BFGS


def rosenbrock(x: Tensor) -> Tensor:
    return ((1 - x[..., :-1]) ** 2 + 100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2).sum(-1)


def quadratic(x: Tensor) -> Tensor:
    curvatures = torch.linspace(0.5, 4.0, x.shape[-1], dtype=x.dtype)
    return (curvatures * (x - 1) ** 2).sum(-1) + (x[..., 0] * x[..., 1])


def ours(function: Callable[[Tensor], Tensor], x: Tensor, steps: int, lr: float, history: int) -> Tensor:
    optimiser = BatchedLBFGS(lr, history)
    for _ in range(steps):
        leaf = x.detach().requires_grad_()
        x = x + optimiser.step(torch.autograd.grad(function(leaf).sum(), leaf)[0])
    return x


@pytest.mark.parametrize(
    ("function", "lr", "history"), [(quadratic, 0.8, 10), (quadratic, 0.5, 3), (rosenbrock, 0.02, 10)]
)
def test_one_row_is_torchs_lbfgs(function: Callable[[Tensor], Tensor], lr: float, history: int) -> None:
    start = torch.tensor([[-0.5, 0.7, 0.3, 0.9]], dtype=torch.float64)
    parameter = torch.nn.Parameter(start[0].clone())
    optimiser = torch.optim.LBFGS(
        [parameter], lr=lr, max_iter=12, max_eval=100, history_size=history, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = function(parameter)
        value.backward()
        return value

    optimiser.step(closure)
    found = ours(function, start, 12, lr, history)
    assert distance(found[0], parameter.detach()) < 1e-12
    assert distance(found, start) > 0.1  # it moved


def test_rows_do_not_touch() -> None:
    start = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = ours(quadratic, start, 15, 0.8, 5)
    alone = torch.cat([ours(quadratic, start[row : row + 1], 15, 0.8, 5) for row in range(5)])
    assert distance(together, alone) < 1e-12
    assert float(quadratic(together).max()) < float(quadratic(start).min())


def test_no_step_is_longer_than_the_radius_and_the_first_is_that_long() -> None:
    optimiser = BatchedLBFGS(0.5, 10, radius=2.0)
    generator = torch.Generator().manual_seed(0)
    steps = [optimiser.step(torch.randn(3, 6, generator=generator)).norm(dim=1) for _ in range(8)]
    assert torch.allclose(steps[0], torch.ones(3))
    assert all(bool((step <= 1 + 1e-5).all()) for step in steps)


def test_a_row_that_rejects_a_pair_goes_on_straight() -> None:
    """Where the gradient does not change, as between two words, nothing is learnt of the curvature."""
    optimiser, gradient = BatchedLBFGS(0.5, 4, radius=1.0), torch.tensor([[3.0, 4.0]])
    steps = [optimiser.step(gradient) for _ in range(3)]
    assert all(torch.allclose(step, torch.tensor([[-0.3, -0.4]])) for step in steps)


# Words and vectors


def test_vectors_of_words_are_read_exactly_as_the_words(any_model: Model) -> None:
    known = model_words(any_model, tuple(caption_words()))
    index = torch.cat([indices(known, CAPTION), indices(known, " ".join(reversed(CAPTION.split())))])
    fed = encode(any_model, known, known.table[index])
    read = any_model.encode(known.texts(index))
    assert fed.tensors.keys() == read.tensors.keys()
    assert all(torch.equal(fed.tensors[name], read.tensors[name]) for name in read.tensors)
    encode(any_model, known, torch.zeros_like(known.table[index]))
    again = any_model.encode(known.texts(index))  # nothing is left behind
    assert all(torch.equal(again.tensors[name], read.tensors[name]) for name in read.tensors)


def test_vectors_have_the_gradient_of_what_is_read(any_model: Model) -> None:
    known = model_words(any_model, tuple(caption_words()))
    vectors = known.table[indices(known, CAPTION)].double()
    for part in any_model.pipeline.components.values():
        if isinstance(part, torch.nn.Module) and "TextModel" in type(part).__name__:
            part.double()
    direction = torch.randn(vectors.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def value(at: Tensor) -> Tensor:
        states: Condition = encode(any_model, known, at)
        return states.tensors["encoder_hidden_states"].square().sum()

    leaf = vectors.requires_grad_()
    slope = float((torch.autograd.grad(value(leaf), leaf)[0] * direction).sum())
    with torch.no_grad():
        h = 1e-5
        numeric = float(value(vectors + h * direction) - value(vectors - h * direction)) / (2 * h)
    for part in any_model.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()
    assert abs(numeric) > 1e-3
    assert slope == pytest.approx(numeric, rel=1e-5)


def test_the_nearest_word_is_the_nearest(model: Model) -> None:
    known = model_words(model, tuple(caption_words()))
    vectors = known.table.mean() + torch.randn(2, 3, known.table.shape[1], generator=torch.Generator().manual_seed(0))
    for cosine in (False, True):
        found = known.nearest(vectors, cosine=cosine)
        for b in range(2):
            for k in range(3):
                if cosine:
                    scores = -torch.cosine_similarity(known.table, vectors[b, k][None])
                else:
                    scores = (known.table - vectors[b, k]).norm(dim=1)
                assert int(found[b, k]) == int(scores.argmin())
    own = torch.arange(len(known.words))[None]
    assert torch.equal(known.nearest(known.table[own]), own)


def test_only_whole_words_are_chosen_unless_asked_for(model: Model) -> None:
    tokenizer = model.pipeline.tokenizer
    known = model_words(model)
    ids = tokenizer(list(known.words), add_special_tokens=False).input_ids
    assert all(len(one) == 1 for one in ids)
    assert all(word.isalpha() and (len(word) > 1 or word in "ai") for word in known.words)
    assert set(caption_words()) <= set(known.words) and "<|endoftext|>" not in known.words
    assert model_words(model, tuple(caption_words())).words == tuple(
        word for word in known.words if word in caption_words()
    )
    entries = tokenizer.get_vocab()
    assert {"<|startoftext|>", "<|endoftext|>"} & set(model_words(model, "tokens").words) == set()
    assert {"<|startoftext|>", "<|endoftext|>"} <= set(model_words(model, "all").words)
    weight = model.pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(known.table[known.words.index("circle")], weight[entries["circle</w>"]])


def test_a_word_has_its_embeddings_in_both_of_sdxls_encoders(tmp_path: Path) -> None:
    model = load_model(str(save_pipeline(tmp_path, None, seed=1, layout=LAYOUTS[1], prediction="epsilon")))
    known = model_words(model, tuple(caption_words()))
    place = model.pipeline.tokenizer.get_vocab()["star</w>"]
    parts = [model.pipeline.text_encoder, model.pipeline.text_encoder_2]
    rows = torch.cat([part.get_input_embeddings().weight[place] for part in parts])
    assert torch.equal(known.table[known.words.index("star")], rows)


# PH2P, PEZ and the floor


def test_each_image_has_its_own_noise(problem: InversionProblem) -> None:
    chosen = PH2PSettings(tokens=4, draws=40)
    x0 = problem.latents()
    z, eps, t = draw_noise(x0, problem, problem.generators("ph2p"), chosen)
    assert 500 <= int(t.min()) < 530 and 870 < int(t.max()) <= 899
    alone = replace(problem, images=problem.images[2:], ids=problem.ids[2:])
    only = draw_noise(x0[2:], alone, alone.generators("ph2p"), chosen)
    assert all(torch.equal(whole[80:], one) for whole, one in zip((z, eps, t), only, strict=True))
    alpha, sigma = problem.model.denoiser.schedule.at(t, z)
    assert distance(z, alpha * x0.repeat_interleave(40, dim=0) + sigma * eps) < 1e-6


def test_the_loss_is_that_of_the_noise_which_v_implies(problem: InversionProblem) -> None:
    known, chosen = problem.words, PH2PSettings(tokens=13, draws=2)
    texts = [prompt.text for prompt in open_data("shapes").prompts(3)]
    texts = [" ".join(text.split()[:13]) for text in texts]
    index = torch.cat([indices(known, text) for text in texts])
    z, eps, t = draw_noise(problem.latents(), problem, problem.generators("ph2p"), chosen)
    losses, gradient = loss_and_gradient(problem, problem.model.guided(1.0), known.table[index], z, eps, t)
    rows = torch.arange(3).repeat_interleave(2)
    v = problem.model.denoiser.output(z, t, problem.model.encode(texts).rows(rows))
    alpha, sigma = problem.model.denoiser.schedule.at(t, z)
    expected = (sigma * z + alpha * v - eps).square().flatten(1).mean(1).view(3, 2).mean(1)
    assert problem.model.denoiser.prediction == "v_prediction"
    assert torch.allclose(losses, expected, rtol=1e-4)
    assert gradient.shape == (3, 13, known.table.shape[1]) and float(gradient.abs().max()) > 0


def test_a_prompt_starts_with_the_given_words_and_the_others_are_drawn(problem: InversionProblem) -> None:
    drawn = problem.words.draw(5, problem.generators("ph2p"))
    found = starting_words(drawn, problem.words, "A Red")
    assert problem.words.texts(found[:, :2]) == ["a red"] * 3
    assert torch.equal(found[:, 2:], drawn[:, 2:])
    assert not torch.equal(drawn[0], drawn[1])


def test_ph2p_takes_no_time_beyond_the_schedule(problem: InversionProblem) -> None:
    """At T a trajectory ends clean, and there is no noise to predict."""
    for t_high in (1000, 1500):
        told = PH2PSettings(tokens=5, rounds=2, evaluations=1, candidates=1, t_high=t_high)
        with pytest.raises(
            WrongCommand, match=f"^the range of t_low and t_high has the time {t_high}, and this model's times go"
        ):
            ph2p(problem, told, nothing)


def test_ph2p_inverts_on_each_layout(any_model: Model) -> None:
    data = open_data("shapes")
    known = model_words(any_model, tuple(caption_words()))
    ids = tuple(prompt.id for prompt in data.prompts(2))
    whole = InversionProblem(any_model, known, next(data.images(2)), ids, 0)
    found = ph2p(whole, PH2PSettings(tokens=5, rounds=2, evaluations=3, candidates=2, radius=4.0), nothing)
    assert [len(candidates) for candidates in found] == [2, 2]
    assert all(len(text.split()) == 5 and set(text.split()) <= set(caption_words()) for one in found for text in one)
    assert found[0][0] != found[0][1]  # it moved


def test_searches_begin_anew_on_other_noise(problem: InversionProblem) -> None:
    once = PH2PSettings(tokens=5, rounds=2, evaluations=3, candidates=2, radius=4.0)
    calls: list[None] = []
    found = ph2p(problem, once.model_copy(update={"searches": 2}), lambda: calls.append(None))
    assert len(calls) == INVERTERS["ph2p"].evaluations(once.model_copy(update={"searches": 2})) == 12
    assert [candidates[:2] for candidates in found] == ph2p(problem, once, nothing)
    assert [candidates[2:] for candidates in found] != [candidates[:2] for candidates in found]


# PH2P's winners


def test_prompts_are_judged_on_timesteps_of_every_part_of_the_range(problem: InversionProblem) -> None:
    chosen, x0 = PH2PSettings(judging=8), problem.latents()
    draws = judging_noise(x0, problem, chosen)
    t = torch.stack([draw[2] for draw in draws])
    assert torch.equal((t - 500) // 50, torch.arange(8)[:, None].expand(8, 3))  # 500 … 899 in eight parts
    assert len(set(t.flatten().tolist())) > 8  # each image has its own
    for z, eps, times in draws:
        alpha, sigma = problem.model.denoiser.schedule.at(times, z)
        assert distance(z, alpha * x0 + sigma * eps) < 1e-6
    narrow = judging_noise(x0, problem, PH2PSettings(judging=5, t_low=700, t_high=701))
    assert {int(one) for draw in narrow for one in draw[2]} == {700, 701}


def test_the_common_noise_of_an_image_is_its_own(problem: InversionProblem) -> None:
    """It depends neither on the other images nor on earlier draws."""
    chosen, order = PH2PSettings(judging=3), [2, 0]
    together = judging_noise(problem.latents(), problem, chosen)
    part = replace(problem, images=problem.images[order], ids=tuple(problem.ids[row] for row in order))
    draw_noise(part.latents(), part, part.generators("ph2p"), chosen)
    apart = judging_noise(part.latents(), part, chosen)
    for whole, some in zip(together, apart, strict=True):
        assert torch.equal(whole[1][order], some[1]) and torch.equal(whole[2][order], some[2])
        assert distance(whole[0][order], some[0]) < 1e-6
    other = judging_noise(problem.latents(), replace(problem, seed=1), chosen)
    assert not torch.equal(other[0][1], together[0][1])


def common_loss(problem: InversionProblem, index: Tensor, noise: list[Noise]) -> Tensor:
    """The mean loss [B] of words int64 [B, K] over draws of noise, from the network's output itself."""
    told = problem.model.encode(problem.words.texts(index))
    found = []
    for z, eps, t in noise:
        alpha, sigma = problem.model.denoiser.schedule.at(t, z)
        v = problem.model.denoiser.output(z, t, told)
        found.append((sigma * z + alpha * v - eps).square().flatten(1).mean(1))
    return torch.stack(found).mean(0)


def test_the_winner_has_the_lowest_loss_on_common_noise_and_not_on_its_own(problem: InversionProblem) -> None:
    """Of two prompts the worse one is looked at where t is large, and its own loss there is the lower."""
    chosen, x0, denoiser = PH2PSettings(tokens=6), problem.latents(), problem.model.guided(1.0)
    texts = ["a small red circle left of", "large blue star above grey background"]
    index = [indices(problem.words, text).expand(3, -1) for text in texts]
    noise = judging_noise(x0, problem, chosen)
    common = torch.stack([common_loss(problem, one, noise) for one in index])
    losses = torch.stack([judging_losses(problem, denoiser, words, noise) for words in index])
    assert torch.allclose(losses, common, rtol=1e-4)
    better = common.argmin(0)
    rounds = []
    for place, one in enumerate(index):
        t = torch.where(better == place, 500, 899)
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(place))
        z = problem.model.denoiser.schedule.add_noise(x0, eps, t)
        rounds.append(Round(one, judging_losses(problem, denoiser, one, [(z, eps, t)]), t[:, None]))
    assert torch.equal(torch.stack([one.losses for one in rounds]).argmin(0), 1 - better)  # their own noise is wrong
    best = torch.stack([one.index for one in rounds])[better, torch.arange(3)]
    prompts = [one.index for one in rounds]
    assert torch.equal(winner(problem, denoiser, prompts, noise), best)
    assert torch.equal(winner(problem, denoiser, prompts[::-1], noise), best)
    assert torch.equal(winner(problem, denoiser, prompts[:1], noise), prompts[0])


def test_candidates_are_the_winners_of_their_stretches(problem: InversionProblem) -> None:
    chosen = PH2PSettings(tokens=5, rounds=7, evaluations=2, candidates=3, radius=4.0, searches=2, judging=3)
    assert chosen.stretches == [2, 2, 3] and sum(PH2PSettings(rounds=25, candidates=8).stretches) == 25
    x0, denoiser = problem.latents(), problem.model.guided(1.0)
    generators, noise = problem.generators("ph2p"), judging_noise(x0, problem, chosen)
    expected = []
    for _ in range(2):
        rounds = list(search(problem, denoiser, chosen, x0, generators, nothing))
        for start, end in ((0, 2), (2, 4), (4, 7)):
            index = torch.stack([one.index for one in rounds[start:end]])
            losses = torch.stack([common_loss(problem, one, noise) for one in index])
            expected.append(problem.words.texts(index[losses.argmin(0), torch.arange(3)]))
    assert ph2p(problem, chosen, nothing) == [list(one) for one in zip(*expected, strict=True)]


def test_no_timestep_wins_more_often_than_by_chance(problem: InversionProblem) -> None:
    """Of 90 stretches of four rounds a quarter is won by the round of the largest t, within four standard deviations.

    By the loss on each round's own noise it is nearly all of them.
    """
    chosen = PH2PSettings(tokens=5, rounds=120, evaluations=1, candidates=30, radius=4.0, judging=2)
    x0, denoiser = problem.latents(), problem.model.guided(1.0)
    rounds = list(search(problem, denoiser, chosen, x0, problem.generators("ph2p"), nothing))
    noise = judging_noise(x0, problem, chosen)
    t = torch.stack([one.t[:, 0] for one in rounds]).view(30, 4, 3)
    own = torch.stack([one.losses for one in rounds]).view(30, 4, 3)
    common = torch.stack([judging_losses(problem, denoiser, one.index, noise) for one in rounds]).view(30, 4, 3)
    tolerance = 4 * (0.25 * 0.75 / 90) ** 0.5
    assert float((common.argmin(1) == t.argmax(1)).double().mean()) == pytest.approx(0.25, abs=tolerance)
    assert float((own.argmin(1) == t.argmax(1)).double().mean()) > 0.9


def test_a_loss_that_is_not_finite_stops_the_search() -> None:
    best, index = Best(), torch.zeros(2, 3, dtype=torch.long)
    best.update(torch.tensor([1.0, 2.0]), index)
    for bad in (float("nan"), float("inf")):
        losses = torch.tensor([0.5, bad])
        assert sentence(DdilError, lambda losses=losses: best.update(losses, index + 1)) == (  # type: ignore[misc]
            "the loss of a prompt is NaN or infinite, so that prompts cannot be compared; the weights of the model "
            "or of CLIP are damaged: download or train them again"
        )
    assert best.losses.tolist() == [1.0, 2.0] and torch.equal(best.index, index)


def test_similarities_that_are_not_finite_choose_nothing(problem: InversionProblem, towers: Towers) -> None:
    """NaN would be the largest of all."""
    nan = replace(towers, encode_images=lambda images: towers.encode_images(images) * float("nan"))
    broken = replace(problem, towers=nan)
    candidates, choosing = [["red", "blue"]] * 3, SelectionSettings(resolve_sampling(problem.model, 2))
    with pytest.raises(DdilError, match="^the similarities of the CLIP 'shapes', computed in float32, are not finite"):
        choose(broken, candidates, choosing)


def test_the_spacing_is_the_distance_of_neighbours(model: Model) -> None:
    known = model_words(model, tuple(caption_words()))
    distances = (known.table[:, None] - known.table[None]).norm(dim=-1)
    nearest = [sorted(row)[1] for row in distances.tolist()]
    assert known.spacing == pytest.approx(float(torch.tensor(nearest).median()), rel=1e-4)


@pytest.mark.usefixtures("a_gpu")
def test_on_a_gpu_a_batch_gives_what_each_image_gives(folder: Path) -> None:
    teacher, data, allowed = load_model(str(folder), "cuda"), open_data("shapes"), tuple(caption_words())
    towers = load_inversion_towers("shapes", "cuda")
    ids = tuple(prompt.id for prompt in data.prompts(3))
    images = next(data.images(3))
    whole = InversionProblem(teacher, model_words(teacher, allowed), images, ids, 0, towers, towers.words(allowed))
    choosing = SelectionSettings(resolve_sampling(teacher, 2))
    for name, inverter in INVERTERS.items():
        (together,) = invert(whole, inverter, SMALL[name], 3, choosing)
        last = replace(whole, images=images[2:], ids=ids[2:])
        (alone,) = invert(last, inverter, SMALL[name], 3, choosing)
        assert together[2].prompt == alone[0].prompt


SMALL = {
    "ph2p": PH2PSettings(tokens=6, rounds=3, evaluations=3, candidates=2, radius=4.0),
    "pez": PEZSettings(tokens=6, iterations=5),
    "random": RandomSettings(tokens=6),
}


@pytest.mark.parametrize("name", list(INVERTERS))
def test_a_batch_gives_what_each_image_gives_at_an_equally_padded_batch(name: str, problem: InversionProblem) -> None:
    choosing = SelectionSettings(resolve_sampling(problem.model, 2))
    (together,) = invert(problem, INVERTERS[name], SMALL[name], 3, choosing)
    alone = []
    for row in (2, 0, 1):
        part = replace(problem, images=problem.images[row : row + 1], ids=problem.ids[row : row + 1])
        alone += [found for batch in invert(part, INVERTERS[name], SMALL[name], 3, choosing) for found in batch]
    assert [(one.id, one.prompt, one.candidates) for one in together] == [
        (one.id, one.prompt, one.candidates) for one in (alone[1], alone[2], alone[0])
    ]
    assert len({one.prompt for one in together}) == 3
    assert all(len(one.prompt.split()) == 6 and set(one.prompt.split()) <= set(caption_words()) for one in together)


def test_another_seed_gives_other_words(problem: InversionProblem) -> None:
    found = [random_words(replace(problem, seed=seed), SMALL["random"], nothing) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_the_winner_is_the_candidate_whose_image_is_most_similar(problem: InversionProblem, towers: Towers) -> None:
    candidates = [["red circle", "large blue star", "a grey moon"]] * 3
    sampling = resolve_sampling(problem.model, 2)
    prompts, similarities = choose(problem, candidates, SelectionSettings(sampling, images=2))
    for row, name in enumerate(problem.ids):
        scores = []
        for text in candidates[row]:
            images = sample_images(
                problem.model, [Sample(f"{name}/choosing", n) for n in (0, 1)], [text] * 2, sampling, 0
            )
            scores.append(towers.similarity(images, problem.images[[row, row]]).mean())
        assert prompts[row] == candidates[row][int(np.argmax(scores))]
        assert similarities[row] == pytest.approx(max(scores), abs=1e-4)


def test_pez_finds_words_that_clip_likes_better_than_words_at_random(problem: InversionProblem, towers: Towers) -> None:
    found = pez(problem, PEZSettings(tokens=8, iterations=40), nothing)
    floor = random_words(problem, RandomSettings(tokens=8), nothing)
    with torch.no_grad():
        target = towers.encode_images(problem.images)
        better, worse = ((towers.encode_texts([text for (text,) in one]) * target).sum(-1) for one in (found, floor))
    assert bool((better > worse + 0.1).all())


@pytest.mark.weights
def test_ph2p_finds_words_of_what_the_teacher_sees(towers: Towers) -> None:
    """From a sentence that is wrong in nearly everything, a few rounds predict the noise better."""
    teacher, data, allowed = load_model("shapes"), open_data("shapes"), tuple(caption_words())
    start = "a small red circle above a small red circle on a black background"
    whole = InversionProblem(
        teacher, model_words(teacher, allowed), next(data.images(4)), tuple(p.id for p in data.prompts(4)), 0, towers
    )
    found = ph2p(
        whole,
        PH2PSettings(tokens=13, start=start, rounds=12, evaluations=2, candidates=1, radius=0.5, draws=2),
        nothing,
    )
    known, held_out = whole.words, PH2PSettings(tokens=13, draws=16)
    z, eps, t = draw_noise(whole.latents(), whole, whole.generators("held out"), held_out)
    vectors = [
        known.table[torch.cat([indices(known, text) for text in texts])]
        for texts in ([start] * 4, [one[0] for one in found])
    ]
    before, after = (loss_and_gradient(whole, teacher.guided(1.0), one, z, eps, t)[0] for one in vectors)
    assert float(after.mean()) < 0.7 * float(before.mean())


# Towers in a folder


def save_clip(folder: Path) -> Path:
    """A tiny untrained CLIP in transformers' layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = write_tokenizer(folder / "words")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip", safe_serialization=True)
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "clip")
    return folder / "clip"


def test_towers_of_a_folder_give_unit_vectors_and_read_vectors_as_words(tmp_path: Path) -> None:
    towers = load_inversion_towers(str(save_clip(tmp_path)))
    images = next(open_data("shapes").images(2))
    assert torch.allclose(towers.encode_images(images).norm(dim=1), torch.ones(2), atol=1e-6)
    assert towers.similarity(images, images) == pytest.approx([1.0, 1.0], abs=1e-6)
    known = towers.words(tuple(caption_words()))
    with known.reading(known.table[indices(known, CAPTION)]) as prompts:
        fed = towers.encode_texts(prompts)
    assert torch.equal(fed, towers.encode_texts([CAPTION]))
    assert towers.identity["weights"].keys() == {"model.safetensors"}


def test_towers_whose_tokenizer_names_no_length_take_that_of_their_encoder(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in told.items() if key != "model_max_length"}))
    assert load_inversion_towers(str(folder)).words(tuple(caption_words())).limit == MAX_TOKENS - 2


# What is refused


def sentence(kind: type[DdilError], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as error:
        action()
    assert type(error.value) is kind
    return str(error.value)


@pytest.mark.parametrize("name", list(INVERTERS))
def test_more_tokens_than_the_encoder_takes_are_refused(name: str, problem: InversionProblem) -> None:
    inverter, chosen = get_inverter(name, {"tokens": 19})
    owner = "the CLIP 'shapes'" if name == "pez" else repr(problem.model.reference)
    assert sentence(WrongCommand, lambda: inverter.run(problem, chosen, nothing)) == (
        f"the text encoder of {owner} takes 18 words in a prompt, and the setting 'tokens' is 19; set fewer tokens"
    )


def test_an_encoder_without_a_usable_vocabulary_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokens = ["b", "c</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=8)
    parts = [(tokenizer, torch.nn.Embedding(4, 2))]
    assert sentence(WrongCommand, lambda: gather_words(parts, "words", "'it'", torch.device("cpu"))) == (
        "the text encoder of 'it' has no usable vocabulary: none of its 4 tokens is a whole word; "
        "name another model, or say --set vocabulary=tokens"
    )
    assert gather_words(parts, "tokens", "'it'", torch.device("cpu")).words == ("b", "c")


def test_a_model_without_a_text_encoder_is_refused(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path, None, seed=1, layout=LAYOUTS[1], prediction="epsilon")
    index = json.loads((folder / "model_index.json").read_text())
    without = {"text_encoder": [None, None], "text_encoder_2": [None, None]}  # which diffusers allows for SDXL
    (folder / "model_index.json").write_text(json.dumps(index | without))
    model = load_model(str(folder))
    assert sentence(WrongCommand, lambda: model_words(model)) == (
        f"the model '{folder}' has no text encoder and cannot generate images from prompts; name another model"
    )


def test_without_clip_neither_pez_nor_a_choice_is_possible(problem: InversionProblem) -> None:
    without = replace(problem, towers=None, tower_words=None)
    cure = (
        "CLIP's image tower for this text encoder is missing; put CLIP (openai/clip-vit-large-patch14 for "
        "Stable Diffusion 1.5) into a folder and name this folder with --towers"
    )
    assert sentence(DdilError, lambda: pez(without, PEZSettings(), nothing)) == f"the inverter 'pez' cannot run: {cure}"
    choosing = SelectionSettings(resolve_sampling(problem.model, 2))
    assert sentence(DdilError, lambda: choose(without, [["a", "b"]], choosing)) == (
        f"candidate prompts cannot be compared by their images: {cure}, or make one candidate"
    )
    assert choose(without, [["a"], ["b"]], choosing) == (["a", "b"], [None, None])


def test_a_folder_that_holds_no_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert sentence(DdilError, lambda: load_inversion_towers(str(tmp_path))) == (
        f"the folder {tmp_path} holds no CLIP: it lacks model.safetensors, preprocessor_config.json; "
        "name a folder in transformers' layout"
    )


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("pex", {}, "the inverter 'pex' is not known; it may be one of ph2p, pez, random; did you mean 'pez'?"),
        ("pez", {"iteration": 3}, "the inverter 'pez' has the unknown key 'iteration'; did you mean 'iterations'?"),
        (
            "ph2p",
            {"t_low": 900},
            "the inverter 'ph2p' has a value that does not fit: t_low is 900, above t_high, which is 899",
        ),
        (
            "ph2p",
            {"rounds": 2},
            "the inverter 'ph2p' has a value that does not fit: "
            "there are 8 candidates and only 2 rounds; each candidate needs a round",
        ),
    ],
)
def test_inverters_and_settings_that_are_not_known_are_refused(
    name: str, chosen: dict[str, object], message: str
) -> None:
    assert sentence(WrongCommand, lambda: get_inverter(name, chosen)) == message


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("a red dog", "'start' has the word 'dog', which a prompt may not hold; leave the word out"),
        ("a a a", "'start' has 3 words, and a prompt has only 2 tokens; shorten 'start' or set more tokens"),
    ],
)
def test_a_start_that_cannot_be_meant_is_refused(start: str, message: str, problem: InversionProblem) -> None:
    drawn = problem.words.draw(2, problem.generators("ph2p"))
    assert sentence(WrongCommand, lambda: starting_words(drawn, problem.words, start)) == message


def test_what_was_inverted_is_plain_data() -> None:
    assert InvertedPrompt("x", "a", ("a", "b"), 0.5) == InvertedPrompt(
        **{"id": "x", "prompt": "a", "candidates": ("a", "b"), "similarity": 0.5}
    )


def test_work_folders_keep_the_names_that_earlier_versions_gave(problem: InversionProblem) -> None:
    """The hash in a folder's name has the former key of the number of images."""
    sampling = resolve_sampling(problem.model, 2)
    assert SelectionSettings(sampling, images=3).identity() == {"sampling": asdict(sampling), "pictures": 3}
