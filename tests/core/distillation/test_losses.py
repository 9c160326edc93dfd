"""PD's target against the closed form at every interval, and its loss against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddil_core.diffusion.schedule import CLEAN, Schedule, segments, timestep_grid
from ddil_core.diffusion.solvers import ddim
from ddil_core.distillation.losses import pd_loss, pd_target
from ddil_core.distillation.progressive import two_step_target
from tests.core.closed_form import Gaussian, distance, normal, rows, shifts

SD = Schedule.stable_diffusion()
INTERVALS = [(a, b) for steps in (16, 8, 4, 2, 1) for a, b in segments(timestep_grid(2 * steps), timestep_grid(steps))]


@pytest.mark.parametrize(("first", "second"), INTERVALS, ids=lambda step: "{}-{}".format(*step))
def test_one_step_with_the_target_lands_where_two_steps_do(first: tuple[int, int], second: tuple[int, int]) -> None:
    teacher, told = Gaussian(SD), shifts(16, 0.1, torch.float64)
    z = normal(16, 2, 3, 3, dtype=torch.float64)
    t, middle, s = (rows(value, z) for value in (*first, second[1]))
    target = two_step_target(teacher, z, t, middle, s, told)
    second_estimate = teacher(ddim(SD, z, t, middle, teacher(z, t, told))[0], middle, told)
    landed, _ = ddim(SD, ddim(SD, z, t, middle, teacher(z, t, told))[0], middle, s, second_estimate)
    assert distance(ddim(SD, z, t, s, target)[0], landed) < 1e-10
    # In z/α over σ/α, a DDIM step is a straight line with the slope ε̂. x̃ is where the line through both ends meets σ = 0.
    (scaled_t, ratio_t), (scaled_s, ratio_s) = (
        (state / SD.at(time, z)[0], SD.at(time, z)[1] / SD.at(time, z)[0]) for state, time in ((z, t), (landed, s))
    )
    slope = (scaled_t - scaled_s) / (ratio_t - ratio_s)
    assert distance(scaled_t - ratio_t * slope, target) < 1e-9
    if second[1] == CLEAN:
        torch.testing.assert_close(target, second_estimate, rtol=1e-12, atol=1e-12)
        assert distance(teacher(z, t, told), target) > 1e-4  # and not the x̂ of the first


def test_every_stage_of_the_halving_is_among_the_intervals() -> None:
    assert len(INTERVALS) == 16 + 8 + 4 + 2 + 1
    assert sum(second[1] == CLEAN for _, second in INTERVALS) == 5


def test_targets_of_rows_at_different_times_are_each_its_own() -> None:
    z, z_s = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1)
    t, s = torch.tensor([999, 500, 250]), torch.tensor([749, 250, CLEAN])
    together = pd_target(SD, z, z_s, t, s)
    for i in range(3):
        own = slice(i, i + 1)
        torch.testing.assert_close(together[own], pd_target(SD, z[own], z_s[own], t[own], s[own]))
    assert torch.equal(together[2], z_s[2])


def test_loss_is_weighted_by_snr_from_one_upwards() -> None:
    x0, target = normal(4, 3, 5, 5), normal(4, 3, 5, 5, seed=1)
    snr = SD.snr(torch.tensor(timestep_grid(4)))
    errors = ((x0.numpy() - target.numpy()).astype(np.float64) ** 2).reshape(4, -1).mean(1)
    expected = (np.maximum(1.0, snr.numpy()) * errors).mean()
    assert float(pd_loss(x0, target, snr)) == pytest.approx(expected, rel=1e-6)
    weights = [float(pd_loss(x0[i : i + 1], target[i : i + 1], snr[i : i + 1])) / errors[i] for i in range(4)]
    np.testing.assert_allclose(weights, [1, 1, 1, float(snr[3])], rtol=1e-5)
