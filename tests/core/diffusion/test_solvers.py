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
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.integrate import integrate
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
from ddil_core.diffusion.solvers import (
    SOLVERS,
    Solver,
    heun_corrector,
    require_start,
    tcd,
    tcd_landing,
    tcd_solver,
)
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import Gaussian, distance, normal, shifts

SD = Schedule.stable_diffusion()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def finer(times: int) -> Schedule:
    """Stable Diffusion's process with ``times`` as many timesteps, so that the rounding of grids is small."""
    count = 1000 * times
    return Schedule.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, count) ** 2 / times)


def solve(name: str, denoiser: Gaussian, z: Tensor, times: Sequence[Time]) -> Tensor:
    """From the first to the last of the times."""
    return integrate(denoiser, SOLVERS[name], z, shifts(len(z)), list(itertools.pairwise(times)))


def order_of(errors: list[float]) -> float:
    """The slope of log error over log step size where the number of steps doubles from error to error."""
    return -float(np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def test_ddim_converges_to_the_probability_flow_with_order_one() -> None:
    denoiser = Gaussian(SD)
    z = normal(64, 1, 1, 1, dtype=torch.float64)
    truth = denoiser.flow(z, 999, CLEAN)
    errors = [distance(solve("ddim", denoiser, z, [*timestep_grid(n), CLEAN]), truth) for n in (16, 32, 64, 128)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03
    assert 0.8 < order_of(errors) < 1.2


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_orders_on_a_fine_schedule_up_to_an_inner_time(name: str, order: int) -> None:
    # The last step to CLEAN is of first order, so that order 2 shows only at an earlier end.
    denoiser = Gaussian(finer(16))
    z = normal(64, 1, 1, 1, dtype=torch.float64)
    start, end = 15999, 4000
    truth = denoiser.flow(z, start, end)
    grids = [[round(t) for t in np.linspace(start, end, n + 1)] for n in (32, 64, 128, 256)]
    assert order_of([distance(solve(name, denoiser, z, g), truth) for g in grids]) == pytest.approx(order, abs=0.2)


def output(z: Tensor, t: float) -> Tensor:
    """The output of a toy network."""
    return torch.tanh(1.3 * z.roll(1, -1) - 0.4 * z) * (0.5 + t / 1000) + 0.1 * z


class Toy:
    """``output`` as a denoiser that counts its calls."""

    nfe = 1

    def __init__(self, prediction: Prediction, schedule: Schedule = SD) -> None:
        self.prediction: Prediction = prediction
        self.schedule, self.calls = schedule, 0

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        return to_x0(self.prediction, output(z, float(t[0])), z, *self.schedule.at(t, z))


def ours(
    name: str, times: Sequence[Time], z: Tensor, prediction: Prediction, schedule: Schedule = SD, end: Time = CLEAN,
    noise: torch.Generator | None = None,
) -> list[Tensor]:  # fmt: skip
    """Every state of a trajectory, the network's output read as ``prediction``."""
    states = list[Tensor]()
    integrate(
        Toy(prediction, schedule), SOLVERS[name], z, Condition({}), transitions(times, end),
        noise=lambda step: torch.randn(z.shape, generator=noise), observe=lambda step, after: states.append(after),
    )  # fmt: skip
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
    # The numbers of steps divide 1000: only then does diffusers' step from t to t − 1000 // steps stay on its grid.
    z = normal(2, 4, 8, 8)
    scheduler = prepared(
        DDIMScheduler, steps, prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=clean,
        steps_offset=1, clip_sample=False,
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
    # final_sigmas_type "zero" ends at σ = 0, as our CLEAN does. The last step is of first order, as λ is infinite there.
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


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("steps", "prediction"), [(4, "epsilon"), (7, "v_prediction"), (1, "sample"), (50, "epsilon")])
def test_tcd_equals_diffusers(steps: int, prediction: Prediction, gamma: float) -> None:
    z, noise = normal(2, 4, 8, 8), torch.Generator().manual_seed(5)
    scheduler = prepared(TCDScheduler, steps, prediction_type=prediction)
    times, states = theirs(scheduler, z, eta=gamma, generator=torch.Generator().manual_seed(5))
    assert timesteps(SD, "lcm", steps) == times
    found = list[Tensor]()
    integrate(
        Toy(prediction), tcd_solver(gamma), z, Condition({}), transitions(times, 0),
        noise=lambda step: torch.randn(z.shape, generator=noise), observe=lambda step, after: found.append(after),
    )  # fmt: skip
    assert same(found, states)


@pytest.mark.parametrize("schedule", [SD, FlowSchedule.straight(3.0)], ids=["diffusion", "flow"])
def test_tcds_noise_is_the_forward_process(schedule: Schedule) -> None:
    """From exact x̂ the state at s has the mean α_s x₀ + r σ_s' ε and, with the added noise, the deviation σ_s."""
    t, s = torch.tensor([900, 500, 400]), torch.tensor([700, 250, 0])
    x0, eps, noise = (normal(3, 1, 4, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    z = schedule.add_noise(x0, eps, t)
    end = tcd_landing(s, 0.3)
    assert end.tolist() == [490, 175, 0]
    alpha, sigma = schedule.at(s, z)
    alpha_end, sigma_end = schedule.at(end, z)
    ratio = alpha / alpha_end * sigma_end
    expected = alpha * x0 + ratio * eps + (sigma**2 - ratio**2).clamp(min=0).sqrt() * noise
    torch.testing.assert_close(tcd(schedule, z, t, s, x0, None, noise, 0.3)[0], expected)


def test_lcm_grids_are_those_of_its_paper() -> None:
    assert timesteps(SD, "lcm", 4) == [999, 759, 499, 259]
    assert timesteps(SD, "lcm", 2) == [999, 499]


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1, "trailing"), (4, "trailing"), (50, "leading"), (7, "leading"), (30, "linspace")]
)
def test_euler_equals_diffusers(prediction: Prediction, steps: int, spacing: str) -> None:
    """diffusers steps x = z/α, from σ_T/α_T or √(1 + σ_T²/α_T²) times the noise. Here z is stepped."""
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


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(("steps", "spacing"), [(1, "trailing"), (4, "trailing"), (20, "leading"), (30, "linspace")])
def test_heun_equals_diffusers(prediction: Prediction, steps: int, spacing: str) -> None:
    """diffusers evaluates the network at each inner time twice, and takes one Euler step to the end."""
    noise = normal(2, 4, 8, 8)
    scheduler = prepared(
        HeunDiscreteScheduler, steps, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    x, states = noise * scheduler.init_noise_sigma, []
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(output(scheduler.scale_model_input(x, t), float(t)), t, x).prev_sample
        if index % 2 or index == len(scheduler.timesteps) - 1:
            states.append(x / (1 + scheduler.sigmas[index + 1] ** 2) ** 0.5)
    times = timesteps(SD, spacing, steps, offset=1)
    assert times == pytest.approx([scheduler.timesteps[0].item(), *scheduler.timesteps[2::2].tolist()], rel=1e-6)
    start = SD.at(rows_at(times[0], noise), noise)[1] if spacing in SOLVERS["heun"].scaled_start else 1.0
    assert same(ours("heun", times, start * noise, prediction), states)


@pytest.mark.parametrize("end", [CLEAN, 0])
@pytest.mark.parametrize("name", SOLVERS)
def test_calls_are_counted(name: str, end: Time) -> None:
    """Heun evaluates twice in every step but the one to the clean end. At timestep 0, σ is above 0."""
    denoiser, z, steps = Toy("epsilon"), normal(2, 4, 8, 8), transitions(timestep_grid(5), end)
    integrate(denoiser, SOLVERS[name], z, Condition({}), steps, noise=lambda step: z)
    assert denoiser.calls == SOLVERS[name].calls(SD, steps) == (5 if name != "heun" else 9 if end == CLEAN else 10)


def test_one_step_of_heun_to_the_clean_end_is_one_of_euler() -> None:
    z = normal(2, 4, 8, 8)
    assert torch.equal(ours("heun", [999], z, "epsilon")[-1], ours("ddim", [999], z, "epsilon")[-1])


def test_a_corrected_step_in_closed_form() -> None:
    """For x̂ = 0 the slope is d = x/σ', so that x is proportional to σ'. Neither Euler nor Heun errs there."""
    t, s, z = torch.tensor([749]), torch.tensor([500]), normal(1, 1, 2, 2, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SD.at(t, z), SD.at(s, z)
    ratio = (sigma_s / alpha_s) / (sigma_t / alpha_t)
    x = z / alpha_t
    euler = alpha_s * (x + (ratio - 1) * x)
    zero = torch.zeros_like(z)
    corrected = heun_corrector(SD, z, t, s, zero, euler, zero)
    torch.testing.assert_close(corrected, alpha_s * ratio * x)


def test_times_of_a_corrected_step_differ_from_row_to_row() -> None:
    t, s = torch.tensor([749, 500, 20]), torch.tensor([500, 250, 0])
    z, x0, z_s, x0_s = (normal(3, 3, 2, 2, seed=i) for i in range(4))
    together = heun_corrector(SD, z, t, s, x0, z_s, x0_s)
    for i in range(3):
        own = slice(i, i + 1)
        alone = heun_corrector(SD, z[own], t[own], s[own], x0[own], z_s[own], x0_s[own])
        torch.testing.assert_close(together[own], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_solvers_that_divide_by_alpha_cannot_start_a_flow(name: str) -> None:
    with pytest.raises(WrongCommand) as error:
        require_start(SOLVERS[name], FlowSchedule.straight(), 1000)
    assert str(error.value) == (
        f"the solver '{name}' works with σ/α, which is infinite where a flow starts; use 'flow_euler'"
    )
    require_start(SOLVERS[name], SD, 999)
    require_start(SOLVERS[name], FlowSchedule.straight(), 999.7)  # DPM-Solver++'s own times begin after pure noise
    require_start(SOLVERS["flow_euler"], FlowSchedule.straight(), 1000)


def test_any_corrector_fits() -> None:
    """A corrector that takes DDIM's step again with the mean of the two x̂."""

    def average(schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, z_s: Tensor, x0_s: Tensor) -> Tensor:
        return SOLVERS["ddim"].step(schedule, z, t, s, (x0 + x0_s) / 2, None, None)[0]

    toy = Solver("average", SOLVERS["ddim"].step, False, False, "this test", average)
    denoiser, z = Gaussian(finer(16)), normal(64, 1, 1, 1, dtype=torch.float64)
    truth, grids = (
        denoiser.flow(z, 15999, 4000),
        [[round(t) for t in np.linspace(15999, 4000, n + 1)] for n in (32, 64)],
    )
    first, second = (
        distance(integrate(denoiser, toy, z, shifts(64), list(itertools.pairwise(grid))), truth) for grid in grids
    )
    assert second < 0.4 * first < 0.01


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
def test_instaflow_follows_its_velocity(steps: int) -> None:
    """The velocity points from noise to data. The loop is written out, and the network reads times from 1000 down."""
    z = z_own = normal(2, 4, 8, 8)
    states = []
    for i in range(steps):
        z_own = z_own + output(z_own, 1000 * (1 - i / steps)) / steps
        states.append(z_own)
    flow = FlowSchedule.straight()
    assert same(ours("flow_euler", timesteps(flow, "even", steps), z, "rectified_flow", flow), states)


@pytest.mark.parametrize("name", SOLVERS)
def test_times_differ_from_row_to_row(name: str) -> None:
    step = SOLVERS[name].step
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


@pytest.mark.parametrize("name", ["ddim", "euler", "flow_euler", "lcm", "tcd"])
def test_times_of_a_flow_differ_from_row_to_row(name: str) -> None:
    flow, step = FlowSchedule.straight(3.0), SOLVERS[name].step
    t, s = torch.tensor([1000.0, 900.0, 500.5, 3.25]), torch.tensor([900.0, 749.9, CLEAN, 0.5])
    z, x0, noise = (normal(4, 3, 2, 2, seed=i) for i in range(3))
    together, _ = step(flow, z, t, s, x0, None, noise)
    for i in range(4):
        own = slice(i, i + 1)
        alone, _ = step(flow, z[own], t[own], s[own], x0[own], None, noise[own])
        torch.testing.assert_close(together[own], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together[2], x0[2])
    if not SOLVERS[name].stochastic:  # the straight line through z_t and x̂
        torch.testing.assert_close(together[1], x0[1] + (z[1] - x0[1]) * 749.9 / 900)


@pytest.mark.parametrize("steps", [8, 64])
def test_euler_on_a_flow_of_gaussians_has_order_one(steps: int) -> None:
    denoiser = Gaussian(FlowSchedule.straight(3.0))
    z = normal(64, 1, 1, 1, dtype=torch.float64)
    truth = denoiser.mean + denoiser.std * z  # at s = 0 the flow has turned N(0, 1) into N(m, s²)
    errors = [
        distance(solve("ddim", denoiser, z, [*denoiser.schedule.grid(n), CLEAN]), truth) for n in (steps, 2 * steps)
    ]
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.12)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(WrongCommand) as error:
        SOLVERS.find("huen")
    assert str(error.value) == (
        "the solver 'huen' is not known; it may be one of ddim, dpmpp_2m, lcm, tcd, euler, flow_euler, heun; "
        "did you mean 'heun'?"
    )
