"""Times of few-step methods on a flow are diffusers', and the consistency function is z where there is no noise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from ddil_core.diffusion.few_step import (
    between,
    consistency_grid,
    consistency_value,
    earlier,
    scheduler_shift,
    time_of,
    times_of,
)
from ddil_core.diffusion.parameterization import to_x0
from ddil_core.diffusion.schedule import CLEAN, FlowSchedule, Schedule, segments
from tests.core.closed_form import normal

SD = Schedule.stable_diffusion()
FLOW = FlowSchedule.straight(3.0)
TIMESTEPS = (999, 749, 499, 249)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.5])
def test_training_timesteps_are_diffusers_shifted_times(shift: float) -> None:
    flow = FlowSchedule.straight(shift)
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).timesteps.flip(0)
    ours = times_of(flow, torch.arange(1000))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    one_by_one = [time_of(flow, n) for n in (0, 20, 499, 980, 999)]
    torch.testing.assert_close(ours[[0, 20, 499, 980, 999]], torch.tensor(one_by_one).float(), rtol=1e-6, atol=0)


def test_the_timesteps_of_dmd2_are_the_grid_of_four_steps() -> None:
    assert [time_of(FLOW, n) for n in TIMESTEPS] == FLOW.grid(4) == [1000, 900, 750, 500]
    assert [time_of(SD, n) for n in TIMESTEPS] == list(TIMESTEPS)
    assert time_of(FLOW, CLEAN) == time_of(SD, CLEAN) == CLEAN
    timesteps = torch.tensor(TIMESTEPS)
    assert times_of(SD, timesteps) is timesteps


def test_a_step_in_equal_parts_is_the_finer_grid() -> None:
    ends = [*TIMESTEPS[1:], CLEAN]
    parts = [time for n, end in zip(TIMESTEPS, ends, strict=True) for time in between(FLOW, n, end, 4)]
    assert parts == FLOW.grid(16)
    assert between(SD, 999, 749, 2) == [999, 874] and between(SD, 249, CLEAN, 2) == [249, 124]


def test_a_step_back_of_twenty_timesteps_walks_the_grid_of_fifty() -> None:
    grid = [*FLOW.grid(50), 0]
    for t, s in pairwise(grid):
        assert earlier(FLOW, t, 20) == pytest.approx(s, abs=1e-9)
    assert earlier(FLOW, 0.5, 20) == 0
    assert (earlier(SD, 999, 20), earlier(SD, 7, 20)) == (979, 0)


def test_the_students_grid_nests_in_the_training_grid_of_a_flow() -> None:
    fine, coarse = consistency_grid(FLOW, 48, 48), consistency_grid(FLOW, 48, 4)
    assert coarse == [1000, 900, 750, 500]
    assert [len(part) for part in segments(fine, coarse)] == [12] * 4


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_a_scheduler_takes_the_students_grid_by_itself(kind: type, shift: float) -> None:
    flow = FlowSchedule.straight(shift)
    for steps in (1, 2, 4, 8, 28):
        scheduler = kind(**scheduler_shift(flow, steps))
        scheduler.set_timesteps(steps)
        grid = torch.tensor(flow.grid(steps), dtype=torch.float64)
        torch.testing.assert_close(scheduler.timesteps.double(), grid, rtol=1e-6, atol=0)
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), grid / 1000, rtol=1e-6, atol=0)
    assert scheduler_shift(flow, 1) == {"shift": shift}


def test_a_shift_that_no_scheduler_can_follow_is_left_as_it_is() -> None:
    assert scheduler_shift(FlowSchedule.straight(1000.0), 500) == {"shift": 1000.0}


def test_the_consistency_function_is_z_without_noise() -> None:
    z, velocity = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    for t in (torch.zeros(3, dtype=torch.long), torch.zeros(3)):
        x0 = to_x0("flow", velocity, z, *FLOW.at(t, z))
        assert torch.equal(consistency_value(FLOW, z, t, x0), z)
    t = torch.tensor([1000.0, 750.0, 16.0])
    scheduler = FlowMatchLCMScheduler(shift=1.0)
    for row in range(3):
        scheduler.set_timesteps(sigmas=[float(t[row]) / 1000])
        theirs = scheduler.step(velocity[row], scheduler.timesteps[0], z[row]).prev_sample  # no noise at its end
        x0 = to_x0("flow", velocity, z, *FLOW.at(t, z))
        np.testing.assert_allclose(consistency_value(FLOW, z, t, x0)[row], theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(consistency_value(SD, z, torch.zeros(3, dtype=torch.long), velocity), z)
