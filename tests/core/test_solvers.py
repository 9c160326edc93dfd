"""Solvers against the closed-form Gaussian, against diffusers' schedulers, and row by row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from torch import Tensor

from ddil_core.errors import WrongCommand
from ddil_core.parameterization import to_x0
from ddil_core.schedule import CLEAN, Schedule, grid, transitions
from ddil_core.solvers import SOLVERS, Step, ddim, dpmpp_2m, get_solver, lcm
from tests.core.closed_form import Gaussian, distance, normal, rows, shifts

SD = Schedule.stable_diffusion()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def finer(times: int) -> Schedule:
    """Stable Diffusion's process with ``times`` as many timesteps, so that the rounding of grids does not show."""
    count = 1000 * times
    return Schedule.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, count) ** 2 / times)


def solve(step: Step, denoiser: Gaussian, z: Tensor, timesteps: list[int]) -> Tensor:
    """From the first to the last of the timesteps."""
    carry = None
    for t, s in itertools.pairwise(timesteps):
        x0 = denoiser(z, rows(t, z), shifts(len(z)))
        z, carry = step(denoiser.schedule, z, rows(t, z), rows(s, z), x0, carry, None)
    return z


def order_of(errors: list[float]) -> float:
    """The slope of log error over log step size where the number of steps doubles from error to error."""
    return -float(np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def test_ddim_converges_to_the_probability_flow_with_order_one() -> None:
    denoiser = Gaussian(SD)
    z = normal(64, 1, 1, 1, dtype=torch.float64)
    truth = denoiser.flow(z, 999, CLEAN)
    errors = [distance(solve(ddim, denoiser, z, [*grid(n), CLEAN]), truth) for n in (16, 32, 64, 128)]
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


def output(z: Tensor, t: int) -> Tensor:
    """A network's output that depends on z and t in no simple way."""
    return torch.tanh(1.3 * z.roll(1, -1) - 0.4 * z) * (0.5 + t / 1000) + 0.1 * z


def ours(
    step: Step, timesteps: list[int], z: Tensor, to_estimate: Callable[..., Tensor], noise: Any = None
) -> list[Tensor]:
    """Every state of a trajectory that ends clean."""
    carry, states = None, []
    for t, s in transitions(timesteps):
        alpha, sigma = SD.at(rows(t, z), z)
        drawn = noise(z) if noise else None
        z, carry = step(SD, z, rows(t, z), rows(s, z), to_estimate(output(z, t), z, alpha, sigma, t), carry, drawn)
        states.append(z)
    return states


def theirs(scheduler: Any, steps: int, z: Tensor, **options: Any) -> tuple[list[int], list[Tensor]]:
    scheduler.set_timesteps(steps)
    timesteps, states = [int(t) for t in scheduler.timesteps], []
    for t in timesteps:
        z = scheduler.step(output(z, t), t, z, **options).prev_sample
        states.append(z)
    return timesteps, states


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(distance(x, y) < 1e-5 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("steps", [4, 20])
def test_ddim_equals_diffusers(prediction: str, steps: int) -> None:
    # Numbers of steps that divide 1000: diffusers goes from t to t − 1000 // steps, which is its own grid only for those.
    z = normal(2, 4, 8, 8)
    scheduler = DDIMScheduler(
        **BETAS, prediction_type=prediction, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    timesteps, states = theirs(scheduler, steps, z)
    assert timesteps[0] == 999
    assert same(ours(ddim, timesteps, z, lambda o, z, a, s, t: to_x0(prediction, o, z, a, s)), states)


@pytest.mark.parametrize("steps", [4, 20])
def test_dpmpp_2m_equals_diffusers(steps: int) -> None:
    # final_sigmas_type "zero" ends at σ = 0 and takes the last step with first order, as λ is infinite there: our CLEAN.
    z = normal(2, 4, 8, 8)
    scheduler = DPMSolverMultistepScheduler(
        **BETAS,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        final_sigmas_type="zero",
    )
    timesteps, states = theirs(scheduler, steps, z)
    assert same(ours(dpmpp_2m, timesteps, z, lambda o, z, a, s, t: to_x0("v_prediction", o, z, a, s)), states)


@pytest.mark.parametrize(("steps", "timesteps"), [(4, [999, 759, 499, 259]), (2, [999, 499])])
def test_lcm_equals_diffusers(steps: int, timesteps: list[int]) -> None:
    def consistency(o: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, t: int) -> Tensor:
        """LCM's boundary scalings, with σ_data = 0.5 and s = 10 t."""
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        return c_skip * z + c_out * to_x0("epsilon", o, z, alpha, sigma)

    z = normal(2, 4, 8, 8)
    drawn = torch.Generator().manual_seed(5)
    found, states = theirs(LCMScheduler(**BETAS), steps, z, generator=torch.Generator().manual_seed(5))
    assert found == timesteps
    assert same(ours(lcm, timesteps, z, consistency, lambda z: torch.randn(z.shape, generator=drawn)), states)


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


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(WrongCommand) as error:
        get_solver("heun")
    assert str(error.value) == "the solver 'heun' is not known; it may be one of ddim, dpmpp_2m, lcm"
