"""Every grid lies inside its schedule and falls, or is refused in one sentence.

Comparison with diffusers' trajectories.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ddil_core.diffusion.schedule import CLEAN, SPACINGS, FlowSchedule, Schedule, Time, rows_at, timesteps, transitions
from ddil_core.diffusion.solvers import ddim as ddim_step
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import Gaussian, distance, normal, shifts
from tests.core.diffusion.test_solvers import BETAS, ours, theirs

SD = Schedule.stable_diffusion()
FLOW = FlowSchedule.straight(3.0)
OFFSETS = (-1, 0, 1, 2, 30)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_grid_lies_inside_its_schedule_and_falls(spacing: str) -> None:
    schedule = FLOW if spacing.startswith("flow") else SD
    refused: dict[int, list[int]] = {offset: [] for offset in OFFSETS}
    for offset in OFFSETS:
        for steps in range(1, 1001):
            try:
                times = timesteps(schedule, spacing, steps, offset)
            except WrongCommand:
                refused[offset].append(steps)
                continue
            assert len(times) == steps
            assert all(a > b for a, b in itertools.pairwise(times))
            assert times[-1] >= 0 and times[0] <= (1000 if schedule is FLOW else 999)
            assert schedule is SD or times[-1] > 0
    plain = list(range(51, 1001)) if spacing == "lcm" else [1000]
    assert refused[0] == plain
    assert refused[1] == ([999, 1000] if spacing == "leading_inner" else plain)
    if spacing == "leading":  # 500 steps start at 998 + offset; its last time is the offset
        assert 500 in refused[2] and 999 in refused[2] and refused[-1] == list(range(1, 1001))
    if spacing == "leading_inner":  # 499 steps start at 998 + offset
        assert 499 in refused[2] and 999 in refused[2] and refused[-1] == [1000]


def test_dpm_solver_leading_with_999_steps_is_refused() -> None:
    """diffusers starts at t = 1000, for which no network is trained, uses the σ of 999, and divides by λ₁ − λ₀ = 0."""
    scheduler = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(999)
    assert int(scheduler.timesteps[0]) == 1000
    sampling = Sampling.from_scheduler(dict(scheduler.config) | {"_class_name": type(scheduler).__name__}, 7.5)
    assert (sampling.solver, sampling.spacing, sampling.offset) == ("dpmpp_2m", "leading_inner", 1)
    for steps in (998, 500, 20):
        assert max(Sampling(solver="dpmpp_2m", steps=steps, spacing="leading_inner", offset=1).times(SD)) <= 999
    with pytest.raises(WrongCommand) as error:
        Sampling(solver="dpmpp_2m", steps=999, spacing="leading_inner", offset=1).transitions(SD)
    assert str(error.value) == (
        "the grid of 999 steps with the spacing 'leading_inner' and the offset 1 has the time 1000, and this "
        "model's times go "
        "from 0 to 999; ask for another number of steps, or for other times"
    )


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((1000, 749), "has the time 1000, and this model's times go from 0 to 999"),
        ((999, CLEAN), "has the time -1, and this model's times go from 0 to 999"),
        ((999, 250, 500), "does not fall from time to time: 999, 250, 500"),
        ((500, 500), "does not fall from time to time: 500, 500"),
    ],
)
def test_timesteps_that_a_model_brings_lie_inside_too(times: tuple[Time, ...], message: str) -> None:
    with pytest.raises(WrongCommand) as error:
        Sampling(steps=len(times), timesteps=times).transitions(SD)
    assert str(error.value).startswith(f"the list of timesteps that the model brings {message}")


def test_a_flow_may_start_at_pure_noise_and_not_at_its_end() -> None:
    assert Sampling(steps=2, timesteps=(1000, 0.5)).times(FLOW) == [1000, 0.5]
    for times in ((1000.5, 3), (1000, 0)):
        with pytest.raises(WrongCommand, match="and this model's times go from"):
            Sampling(steps=2, timesteps=times).times(FLOW)


def ddim(steps: int, spacing: str, **more: Any) -> float:
    """How far our trajectory ends from diffusers' DDIM on the same times, ‖a − b‖/‖b‖."""
    z = normal(2, 4, 8, 8)
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", timestep_spacing=spacing, clip_sample=False, steps_offset=1, **more
    )
    scheduler.set_timesteps(steps)
    times, states = theirs(scheduler, z)
    assert timesteps(SD, spacing, steps, 1) == times
    end = CLEAN if scheduler.config.set_alpha_to_one else 0
    return distance(ours("ddim", times, z, "v_prediction", end=end)[-1], states[-1])


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500])
def test_ddim_trailing_is_that_of_diffusers_where_the_steps_divide_the_timesteps(steps: int) -> None:
    assert ddim(steps, "trailing") < 1e-5


@pytest.mark.parametrize("steps", [3, 6, 7, 9, 11, 12, 15, 30, 60])
def test_ddim_trailing_is_deliberately_another_elsewhere(steps: int) -> None:
    """diffusers steps from t to t − ⌊1000/N⌋, and evaluates the network next at another time.

    Here the two times are equal.

    docs/systems.md gives the range.
    """
    assert 5e-4 < ddim(steps, "trailing") < 0.04


def test_ddim_trailing_converges_to_the_probability_flow_for_any_number_of_steps() -> None:
    """With 600 steps, diffusers ends a fifth of the way off: each of its steps is 1 timestep long and not 5/3."""
    denoiser, z = Gaussian(SD), normal(2, 4, 8, 8)
    truth = denoiser.flow(z, 999, CLEAN)
    states = {"ours": z, "theirs": z}
    scheduler = DDIMScheduler(**BETAS, prediction_type="sample", timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(600)
    for t, s in transitions(timesteps(SD, "trailing", 600)):
        x0 = {name: denoiser(z, rows_at(t, z), shifts(2)) for name, z in states.items()}
        own, _ = ddim_step(SD, states["ours"], rows_at(t, z), rows_at(s, z), x0["ours"])
        states = {"ours": own, "theirs": scheduler.step(x0["theirs"], t, states["theirs"]).prev_sample}
    assert distance(states["ours"], truth) < 0.01
    assert distance(states["theirs"], truth) > 0.2


@pytest.mark.parametrize("steps", [3, 7, 30, 60])
@pytest.mark.parametrize("clean", [True, False])
def test_ddim_leading_is_that_of_diffusers_for_any_number_of_steps(steps: int, clean: bool) -> None:
    assert ddim(steps, "leading", set_alpha_to_one=clean) < 1e-5


def test_beyond_the_last_timestep_lies_the_clean_end() -> None:
    """The reason why a grid must not leave its schedule: index T is ``CLEAN``, with α = 1."""
    alpha, sigma = SD.levels(torch.tensor([1000, CLEAN]))
    assert alpha.tolist() == [1, 1] and sigma.tolist() == [0, 0]
