"""The rollout engine against a plain loop, the strings, and the cost of rollouts."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition, Denoiser
from ddil_core.diffusion.noise import Sample, decisions, initial_noise
from ddil_core.diffusion.rollout import (
    STUDENT,
    TEACHER,
    Actor,
    RolloutResult,
    all_strings,
    pair_actors,
    require_stateless,
    rollout_latents,
    strings_at,
)
from ddil_core.diffusion.schedule import Schedule, timestep_grid, transitions
from ddil_core.diffusion.solvers import SOLVERS, ddim
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import Gaussian, distance, normal, rows, shifts

SD = Schedule.stable_diffusion()
RATES = (0.8, 0.6, 0.4, 0.2)
COUNT = 6


def gaussians(teacher_steps: int = 32) -> dict[str, Actor]:
    teacher, student = Gaussian(SD, 0.4, 0.6, nfe=2), Gaussian(SD, -0.3, 0.9)
    return pair_actors(teacher, student, timestep_grid(teacher_steps), timestep_grid(4))


def by_key(leaves: RolloutResult) -> dict[tuple[int, str], Tensor]:
    keys = list(zip(leaves.sample, leaves.string, strict=True))
    assert len(set(keys)) == len(keys) == len(leaves.latents)
    return dict(zip(keys, leaves.latents, strict=True))


def walk(denoiser: Denoiser, z: Tensor, steps: list[tuple[int, int]], condition: Condition) -> Tensor:
    for t, s in steps:
        z, _ = ddim(denoiser.schedule, z, rows(t, z), rows(s, z), denoiser(z, rows(t, z), condition))
    return z


def naive(actors: dict[str, Actor], z: Tensor, condition: Condition, sample: int, string: str) -> Tensor:
    """Roll out one sample along one string, alone."""
    state, told = z[sample : sample + 1], condition.rows(torch.tensor([sample]))
    for transition, name in enumerate(string):
        state = walk(actors[name].denoiser, state, actors[name].steps[transition], told)
    return state[0]


def test_every_string_equals_its_own_loop() -> None:
    actors, z, condition = gaussians(), normal(COUNT, 2, 4, 4), shifts(COUNT, 0.2)
    leaves = by_key(rollout_latents(actors, z, condition, [set(all_strings(4))] * COUNT, batch_size=5))
    assert len(leaves) == COUNT * 16
    for (sample, string), latents in leaves.items():
        assert distance(latents, naive(actors, z, condition, sample, string)) < 1e-5


def test_p_teacher_one_and_zero_are_the_pure_models_bit_for_bit() -> None:
    actors, z, condition = gaussians(), normal(COUNT, 2, 4, 4), shifts(COUNT, 0.2)
    draws = decisions([Sample("p", i) for i in range(COUNT)], 4, seed=0)
    for p, name, steps in ((1.0, TEACHER, 32), (0.0, STUDENT, 4)):
        strings = strings_at(p, draws)
        assert strings == [name * 4] * COUNT
        found = rollout_latents(actors, z, condition, [{string} for string in strings], batch_size=COUNT)
        assert torch.equal(found.latents, walk(actors[name].denoiser, z, transitions(timestep_grid(steps)), condition))


def test_a_larger_rate_only_adds_turns_of_the_teacher() -> None:
    draws = decisions([Sample(f"p{i}") for i in range(500)], 4, seed=0)
    ladder = [strings_at(p, draws) for p in (0.0, *RATES[::-1], 1.0)]
    for fewer, more in itertools.pairwise(ladder):
        assert all(
            b == TEACHER for x, y in zip(fewer, more, strict=True) for a, b in zip(x, y, strict=True) if a == TEACHER
        )
    for p, strings in zip(RATES[::-1], ladder[1:-1], strict=True):
        assert "".join(strings).count(TEACHER) / 2000 == pytest.approx(p, abs=0.05)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(p: float) -> None:
    with pytest.raises(WrongCommand) as error:
        strings_at(p, torch.zeros(1, 4))
    assert str(error.value) == f"p_teacher is a probability, from 0 (student alone) to 1 (teacher alone), not {p}"


def network_rollout(
    model: Model, names: list[int], strings: list[set[str]], batch_size: int
) -> dict[tuple[int, str], Tensor]:
    """Roll samples out with a guided U-Net as the teacher, and the same U-Net without guidance as the student."""
    captions = [f"a small {colour} circle" for colour in ("red", "blue", "green", "yellow", "purple")]
    actors = pair_actors(model.guided(3.0), model.guided(1.0), timestep_grid(8), timestep_grid(4))
    z = initial_noise([Sample(f"n{i}") for i in names], model.latent_shape, seed=0)
    condition = model.encode([captions[i] for i in names])
    leaves = by_key(rollout_latents(actors, z, condition, strings, batch_size=batch_size))
    return {(names[row], string): latents for (row, string), latents in leaves.items()}


def test_latents_do_not_depend_on_what_is_asked_together(model: Model) -> None:
    few = {0: {"TTSS", "SSTT"}, 1: {"TTTT"}, 2: {"STST", "STSS"}, 3: {"SSSS"}, 4: {"TSSS"}}
    many = {i: own | {"TTTT", "TSTS", "SSSS"} for i, own in few.items()}
    order = [3, 0, 4, 2, 1]
    reference = network_rollout(model, list(few), list(few.values()), batch_size=4)
    wider = network_rollout(model, order, [many[i] for i in order], batch_size=4)
    alone = network_rollout(model, [2], [few[2]], batch_size=4)
    other = network_rollout(model, list(few), list(few.values()), batch_size=3)
    assert len(reference) == 7
    for key, latents in reference.items():
        assert torch.equal(wider[key], latents)  # the same shape of device batch: bit for bit
        assert distance(other[key], latents) < 1e-5
    assert all(torch.equal(latents, reference[key]) for key, latents in alone.items())


def test_every_acted_row_is_observed_once() -> None:
    actors, z, condition = gaussians(8), normal(COUNT, 1, 2, 2), shifts(COUNT, 0.2)
    strings = [{"TTSS", "TSSS"}, {"SSSS"}, {"TTTT", "TTTS", "SSST"}, {"STST"}, {"TTSS"}, {"SSSS", "TTTT"}]
    seen: Counter[tuple[int, int, str]] = Counter()

    def observe(actor: str, transition: int, samples: Tensor, z_t: Tensor, z_s: Tensor) -> None:
        seen.update((sample, transition, actor) for sample in samples.tolist())
        after = actors[actor].act(transition, z_t, condition.rows(samples))
        torch.testing.assert_close(after, z_s)
        if transition == 0:
            assert torch.equal(z_t, z[samples])

    leaves = rollout_latents(actors, z, condition, strings, batch_size=4, observe=observe)
    prefixes = Counter(
        (row, k, prefix[-1])
        for row, own in enumerate(strings)
        for k in range(4)
        for prefix in {s[: k + 1] for s in own}
    )
    assert seen == prefixes
    expected = {name: sum(n * actors[name].nfe[k] for (_, k, a), n in prefixes.items() if a == name) for name in actors}
    assert leaves.evaluations == expected


def test_states_of_prefixes_are_kept() -> None:
    actors, z, condition = gaussians(8), normal(3, 1, 2, 2), shifts(3, 0.2)
    strings = [{"TTSS", "TSSS"}, {"SSSS"}, {"TTTT", "SSST"}]
    kept = rollout_latents(actors, z, condition, strings, batch_size=4, keep={"T", "SSS", "SSST", "ST"}).kept
    assert kept.keys() == {"T", "SSS", "SSST"}  # nobody goes along ST
    for prefix, samples in (("T", (0, 2)), ("SSS", (1, 2)), ("SSST", (2,))):
        expected = torch.stack([naive(actors, z, condition, sample, prefix) for sample in samples])
        torch.testing.assert_close(kept[prefix], expected)


def paper_runs(count: int) -> list[list[str]]:
    """The runs of Tables 2, 3 and 4, with the two pure runs: a string for each sample."""
    draws = decisions([Sample(f"coco-{i}") for i in range(count)], 4, seed=0)
    fixed = ["TTTT", "SSSS", "TSSS", "TTSS", "TTTS", "STTT", "SSTT", "SSST"]
    return [strings_at(p, draws) for p in RATES] + [[string] * count for string in fixed]


def alone(actors: dict[str, Actor], runs: list[list[str]]) -> int:
    return sum(actors[a].nfe[k] for run in runs for string in run for k, a in enumerate(string))


def test_the_papers_runs_cost_at_most_half_when_shared() -> None:
    count = 2000
    actors, runs = gaussians(), paper_runs(count)
    wanted = [{run[i] for run in runs} for i in range(count)]
    leaves = rollout_latents(actors, normal(count, 1, 1, 1), shifts(count), wanted, batch_size=512)
    share = sum(leaves.evaluations.values()) / alone(actors, runs)
    assert len(runs) == 12
    assert 0.40 < share <= 0.50


def test_all_strings_cost_fifteen_segments_of_each_model() -> None:
    # Twelve runs on their own take 24 segments of each on average over the decisions, so that 15 of each are 62.5 %.
    count = 3
    actors = gaussians()
    leaves = rollout_latents(
        actors, normal(count, 1, 1, 1), shifts(count), [set(all_strings(4))] * count, batch_size=16
    )
    assert actors[TEACHER].nfe == [16] * 4  # eight steps, two evaluations each
    assert actors[STUDENT].nfe == [1] * 4
    assert leaves.evaluations == {TEACHER: count * 15 * 16, STUDENT: count * 15}
    expected_alone = (4 * sum(RATES) + 4 + 6 + 6) * 16 + (4 * sum(1 - p for p in RATES) + 4 + 6 + 6)
    assert expected_alone == pytest.approx(24 * 17)
    assert sum(leaves.evaluations.values()) / count / expected_alone == pytest.approx(0.625)


def test_all_strings_run_from_the_pure_teacher_to_the_pure_student() -> None:
    strings = all_strings(4)
    assert (strings[0], strings[-1], len(set(strings))) == ("TTTT", "SSSS", 16)


def test_grids_that_do_not_meet_are_refused() -> None:
    with pytest.raises(WrongCommand, match="the grid of 4 steps does not nest in the grid of 30 steps"):
        pair_actors(Gaussian(SD), Gaussian(SD), timestep_grid(30), timestep_grid(4))


@pytest.mark.parametrize("name", ["dpmpp_2m", "lcm"])
def test_solvers_that_remember_or_draw_are_refused(name: str) -> None:
    with pytest.raises(WrongCommand) as error:
        require_stateless(SOLVERS[name])
    assert str(error.value) == (
        f"the solver '{name}' carries state or noise from step to step, so that teacher and student cannot take "
        "turns with it; "
        "use 'ddim'"
    )
    require_stateless(SOLVERS["ddim"])
