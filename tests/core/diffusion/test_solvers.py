"""Solvers against the closed-form Gaussian, against diffusers' schedulers, and row by row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from ddil_core.diffusion.parameterization import Prediction, to_x0
from ddil_core.diffusion.schedule import (
    CLEAN,
    FlowSchedule,
    Schedule,
    Time,
    rows_at,
    timestep_grid,
    timesteps,
    transitions,
)
from ddil_core.diffusion.solvers import SOLVERS, Step, ddim, dpmpp_2m, get_solver
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import Gaussian, distance, normal, shifts

SD = Schedule.stable_diffusion()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def finer(times: int) -> Schedule:
    """Stable Diffusion's process with ``times`` as many timesteps, so that the rounding of grids does not show."""
    count = 1000 * times
    return Schedule.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, count) ** 2 / times)


def solve(step: Step, denoiser: Gaussian, z: Tensor, times: Sequence[Time]) -> Tensor:
    """From the first to the last of the times."""
    carry = None
    for t, s in itertools.pairwise(times):
        x0 = denoiser(z, rows_at(t, z), shifts(len(z)))
        z, carry = step(denoiser.schedule, z, rows_at(t, z), rows_at(s, z), x0, carry, None)
    return z


def order_of(errors: list[float]) -> float:
    """The slope of log error over log step size where the number of steps doubles from error to error."""
    return -float(np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def test_ddim_converges_to_the_probability_flow_with_order_one() -> None:
    denoiser = Gaussian(SD)
    z = normal(64, 1, 1, 1, dtype=torch.float64)
    truth = denoiser.flow(z, 999, CLEAN)
    errors = [distance(solve(ddim, denoiser, z, [*timestep_grid(n), CLEAN]), truth) for n in (16, 32, 64, 128)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03
    assert 0.8 < order_of(errors) < 1.2


@pytest.mark.parametrize(("step", "order"), [(ddim, 1), (dpmpp_2m, 2)])
def test_orders_on_a_fine_schedule_up_to_an_inner_time(step: Step, order: int) -> None:
    # Up to CLEAN the last step of 2M is of first order (λ is infinite there), so that its own order shows before it.
    denoiser = Gaussian(finer(16))
    z = normal(64, 1, 1, 1, dtype=torch.float64)
    start, end = 15999, 4000
    truth = denoiser.flow(z, start, end)
    grids = [[round(t) for t in np.linspace(start, end, n + 1)] for n in (32, 64, 128, 256)]
    assert order_of([distance(solve(step, denoiser, z, g), truth) for g in grids]) == pytest.approx(order, abs=0.2)


def output(z: Tensor, t: float) -> Tensor:
    """A network's output that depends on z and t in no simple way."""
    return torch.tanh(1.3 * z.roll(1, -1) - 0.4 * z) * (0.5 + t / 1000) + 0.1 * z


def ours(
    name: str, times: Sequence[Time], z: Tensor, prediction: Prediction, schedule: Schedule = SD, end: Time = CLEAN,
    noise: torch.Generator | None = None,
) -> list[Tensor]:  # fmt: skip
    """Every state of a trajectory, the network's output read as ``prediction``."""
    carry, states = None, []
    for t, s in transitions(times, end):
        alpha, sigma = schedule.at(rows_at(t, z), z)
        x0 = to_x0(prediction, output(z, t), z, alpha, sigma)
        drawn = None if noise is None else torch.randn(z.shape, generator=noise)
        z, carry = SOLVERS[name].step(schedule, z, rows_at(t, z), rows_at(s, z), x0, carry, drawn)
        states.append(z)
    return states


def theirs(scheduler: Any, z: Tensor, **options: Any) -> tuple[list[float], list[Tensor]]:
    """A scheduler's times and the states of its trajectory, after ``set_timesteps``."""
    times, states = scheduler.timesteps.tolist(), []
    for t in scheduler.timesteps:
        z = scheduler.step(output(z, float(t)), t, z, **options).prev_sample
        states.append(z)
    return times, states


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(distance(x, y) < 1e-5 for x, y in zip(a, b, strict=True))


def prepared(kind: Callable[..., Any], steps: int, **options: Any) -> Any:
    scheduler = kind(**BETAS, **options)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize(
    ("steps", "spacing", "clean"), [(4, "trailing", True), (20, "trailing", True), (50, "leading", False)]
)
def test_ddim_equals_diffusers(prediction: Prediction, steps: int, spacing: str, clean: bool) -> None:
    # Numbers of steps that divide 1000: diffusers goes from t to t − 1000 // steps, which is its own grid only for those.
    z = normal(2, 4, 8, 8)
    scheduler = prepared(
        DDIMScheduler, steps, prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=clean, steps_offset=1,
        clip_sample=False,
    )  # fmt: skip
    times, states = theirs(scheduler, z)
    assert timesteps(SD, spacing, steps, offset=1) == times
    assert same(ours("ddim", times, z, prediction, end=CLEAN if clean else 0), states)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(
    ("steps", "theirs_is", "ours_is"),
    [(50, "linspace", "even"), (32, "linspace", "even"), (4, "trailing", "trailing"), (20, "leading", "leading_inner")],
)
def test_dpmpp_2m_equals_diffusers(prediction: Prediction, steps: int, theirs_is: str, ours_is: str) -> None:
    # final_sigmas_type "zero" ends at σ = 0 and takes the last step with first order, as λ is infinite there: our CLEAN.
    z = normal(2, 4, 8, 8)
    scheduler = prepared(
        DPMSolverMultistepScheduler, steps, prediction_type=prediction, timestep_spacing=theirs_is, steps_offset=1,
        algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2, final_sigmas_type="zero",
    )  # fmt: skip
    times, states = theirs(scheduler, z)
    assert timesteps(SD, ours_is, steps, offset=1) == times
    assert same(ours("dpmpp_2m", times, z, prediction), states)


@pytest.mark.parametrize(
    ("steps", "explicit"),
    [(4, None), (2, None), (1, None), (3, None), (8, None), (4, [999, 749, 499, 249]), (1, [399])],
)
def test_lcm_equals_diffusers(steps: int, explicit: list[int] | None) -> None:
    z = normal(2, 4, 8, 8)
    scheduler = LCMScheduler(**BETAS)
    scheduler.set_timesteps(**({"num_inference_steps": steps} if explicit is None else {"timesteps": explicit}))
    times, states = theirs(scheduler, z, generator=torch.Generator().manual_seed(5))
    assert (explicit or timesteps(SD, "lcm", steps)) == times
    assert same(ours("lcm", times, z, "epsilon", noise=torch.Generator().manual_seed(5)), states)


def test_lcm_grids_are_those_of_its_paper() -> None:
    assert timesteps(SD, "lcm", 4) == [999, 759, 499, 259]
    assert timesteps(SD, "lcm", 2) == [999, 499]


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1, "trailing"), (4, "trailing"), (50, "leading"), (7, "leading"), (30, "linspace")]
)
def test_euler_equals_diffusers(prediction: Prediction, steps: int, spacing: str) -> None:
    """diffusers steps in x = z/α from σ_T/α_T or √(1 + σ_T²/α_T²) times the noise; here z itself is stepped."""
    noise = normal(2, 4, 8, 8)
    scheduler = prepared(
        EulerDiscreteScheduler, steps, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    times, x, states = scheduler.timesteps.tolist(), noise * scheduler.init_noise_sigma, []
    for t, after in zip(scheduler.timesteps, scheduler.sigmas[1:], strict=True):
        x = scheduler.step(output(scheduler.scale_model_input(x, t), float(t)), t, x).prev_sample
        states.append(x / (1 + after**2) ** 0.5)
    assert timesteps(SD, spacing, steps, offset=1) == pytest.approx(times, rel=1e-6)
    start = SD.at(rows_at(times[0], noise), noise)[1] if spacing in SOLVERS["euler"].scaled_start else 1.0
    assert same(ours("euler", timesteps(SD, spacing, steps, offset=1), start * noise, prediction), states)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_flow_euler_equals_diffusers(shift: float, steps: int) -> None:
    z = normal(2, 4, 8, 8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    times, states = theirs(scheduler, z)
    flow = FlowSchedule.from_config(scheduler.config)
    assert timesteps(flow, "flow", steps) == pytest.approx(times, rel=1e-6)
    assert same(ours("flow_euler", timesteps(flow, "flow", steps), z, "flow", flow), states)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_instaflow_is_a_walk_along_its_velocity(steps: int) -> None:
    """The velocity points from noise to data; its clock, from 1000 down, is told to the network. Written out by itself."""
    z = z_own = normal(2, 4, 8, 8)
    states = []
    for i in range(steps):
        z_own = z_own + output(z_own, 1000 * (1 - i / steps)) / steps
        states.append(z_own)
    flow = FlowSchedule.straight()
    assert same(ours("flow_euler", timesteps(flow, "even", steps), z, "rectified_flow", flow), states)


@pytest.mark.parametrize("name", SOLVERS)
def test_times_differ_from_row_to_row(name: str) -> None:
    step = get_solver(name).step
    t, s, before = (
        torch.tensor([749, 500, 250, 3]),
        torch.tensor([500, 250, CLEAN, 0]),
        torch.tensor([999, 749, 500, 9]),
    )
    z, x0, x0_before, noise = (normal(4, 3, 2, 2, seed=i) for i in range(4))
    carry = (x0_before, before) if name == "dpmpp_2m" else None
    together, _ = step(SD, z, t, s, x0, carry, noise)
    for i in range(4):
        own = slice(i, i + 1)
        part = (x0_before[own], before[own]) if name == "dpmpp_2m" else None
        alone, _ = step(SD, z[own], t[own], s[own], x0[own], part, noise[own])
        torch.testing.assert_close(together[own], alone, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[2], x0[2])  # the row that ends clean is its x̂


@pytest.mark.parametrize("name", ["ddim", "euler", "flow_euler", "lcm"])
def test_times_of_a_flow_differ_from_row_to_row(name: str) -> None:
    flow, step = FlowSchedule.straight(3.0), get_solver(name).step
    t, s = torch.tensor([1000.0, 900.0, 500.5, 3.25]), torch.tensor([900.0, 749.9, CLEAN, 0.5])
    z, x0, noise = (normal(4, 3, 2, 2, seed=i) for i in range(3))
    together, _ = step(flow, z, t, s, x0, None, noise)
    for i in range(4):
        own = slice(i, i + 1)
        alone, _ = step(flow, z[own], t[own], s[own], x0[own], None, noise[own])
        torch.testing.assert_close(together[own], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together[2], x0[2])
    if name != "lcm":  # the straight line through z_t and x̂
        torch.testing.assert_close(together[1], x0[1] + (z[1] - x0[1]) * 749.9 / 900)


@pytest.mark.parametrize("steps", [8, 64])
def test_a_flow_of_gaussians_is_walked_with_order_one(steps: int) -> None:
    denoiser = Gaussian(FlowSchedule.straight(3.0))
    z = normal(64, 1, 1, 1, dtype=torch.float64)
    truth = denoiser.mean + denoiser.std * z  # at s = 0 the flow has turned N(0, 1) into N(m, s²)
    errors = [
        distance(solve(ddim, denoiser, z, [*denoiser.schedule.grid(n), CLEAN]), truth) for n in (steps, 2 * steps)
    ]
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.12)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(WrongCommand) as error:
        get_solver("heun")
    assert str(error.value) == "the solver 'heun' is not known; it may be one of ddim, dpmpp_2m, lcm, euler, flow_euler"
