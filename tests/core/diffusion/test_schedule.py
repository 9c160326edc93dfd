"""The schedule against diffusers and published numbers; grids against the paper's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddil_core.diffusion.schedule import (
    CLEAN,
    FlowSchedule,
    Schedule,
    rows_at,
    segments,
    timestep_grid,
    timesteps,
    transitions,
)
from ddil_core.support.errors import WrongCommand

SD = Schedule.stable_diffusion()


@pytest.mark.parametrize(
    ("t", "snr", "tolerance"),
    [(0, 1175, 1), (250, 2.07, 5e-3), (354, 1.0, 5e-3), (500, 0.38, 5e-3), (749, 0.06, 5e-3), (999, 0.0047, 5e-5)],
)
def test_snr_of_stable_diffusion(t: int, snr: float, tolerance: float) -> None:
    assert float(SD.snr(torch.tensor(t))) == pytest.approx(snr, abs=tolerance)


def test_snr_is_above_one_on_the_four_step_grid_at_250_only() -> None:
    assert [t for t in timestep_grid(4) if SD.snr(torch.tensor(t)) > 1] == [250]


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear"},
        {"trained_betas": np.linspace(1e-3, 2e-2, 50), "num_train_timesteps": 50},
    ],
)
def test_equal_to_diffusers(config: dict[str, object]) -> None:
    theirs = DDIMScheduler(**config).alphas_cumprod.double()
    ours = Schedule.from_config(config)
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours.alphas[:-1] ** 2, theirs, rtol=2e-5, atol=0)  # theirs is a float32 product
    torch.testing.assert_close(ours.alphas**2 + ours.sigmas**2, torch.ones_like(ours.alphas), rtol=1e-15, atol=1e-15)


def test_clean_has_no_noise_and_the_first_timestep_has() -> None:
    assert SD.alphas[CLEAN] == 1
    assert SD.sigmas[CLEAN] == 0
    assert torch.isinf(SD.snr(torch.tensor(CLEAN)))
    assert float(SD.sigmas[0]) == pytest.approx(0.029, abs=5e-4)


def test_noise_is_added_row_by_row() -> None:
    x0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    z = SD.add_noise(x0, eps, torch.tensor([999, 250, CLEAN]))
    expected = [SD.alphas[t].float() * x0[i] + SD.sigmas[t].float() * eps[i] for i, t in enumerate((999, 250, CLEAN))]
    torch.testing.assert_close(z, torch.stack(expected))
    assert torch.equal(z[2], x0[2])


def test_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(WrongCommand) as error:
        Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    assert str(error.value) == (
        "the scheduler's beta_schedule 'squaredcos_cap_v2' is not known; it may be 'scaled_linear' or 'linear'"
    )


def test_a_schedule_with_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(WrongCommand, match="rescale_betas_zero_snr"):
        Schedule.from_config({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})


def test_the_paper_grid_and_its_last_transition() -> None:
    assert timestep_grid(4) == [999, 749, 500, 250]
    assert timestep_grid(1) == [999]
    assert transitions(timestep_grid(4)) == [(999, 749), (749, 500), (500, 250), (250, CLEAN)]


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_the_32_step_grid_nests_the_coarser_ones(steps: int) -> None:
    parts = segments(timestep_grid(32), timestep_grid(steps))
    assert [len(part) for part in parts] == [32 // steps] * steps
    assert [step for part in parts for step in part] == transitions(timestep_grid(32))
    assert [(part[0][0], part[-1][1]) for part in parts] == transitions(timestep_grid(steps))


def test_grids_that_do_not_nest_are_refused() -> None:
    with pytest.raises(WrongCommand) as error:
        segments(timestep_grid(32), timestep_grid(3))
    assert str(error.value) == (
        "the grid of 3 steps does not nest in the grid of 32 steps: [666, 333] is not in the finer one; "
        "choose a number of steps that divides 32"
    )


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(WrongCommand, match=f"a grid has from 1 to 999 steps, not {steps}$"):
        timestep_grid(steps)


def test_a_fraction_lies_between_its_neighbours_in_sigma_over_alpha() -> None:
    t = torch.tensor([0.0, 249.75, 998.5, 999.0, CLEAN])
    alpha, sigma = SD.levels(t)
    ratios = SD.sigmas / SD.alphas
    expected = [ratios[0], 0.25 * ratios[249] + 0.75 * ratios[250], (ratios[998] + ratios[999]) / 2, ratios[999], 0.0]
    torch.testing.assert_close(sigma / alpha, torch.tensor([float(r) for r in expected], dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    whole = SD.levels(torch.tensor([0, 250, 999, CLEAN]))
    for found, exact in zip(SD.levels(torch.tensor([0.0, 250.0, 999.0, CLEAN])), whole, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-15)


def test_a_flow_is_a_straight_line_at_any_time() -> None:
    flow = FlowSchedule.straight(3.0)
    assert len(flow) == 1000
    for t in (torch.tensor([1000, 250, CLEAN]), torch.tensor([1000.0, 250.0, CLEAN])):
        alpha, sigma = flow.levels(t)
        assert (alpha.tolist(), sigma.tolist()) == ([0.0, 0.75, 1.0], [1.0, 0.25, 0.0])
    assert flow.to("cpu").grid(4) == flow.grid(4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 2.5])
def test_grids_of_a_flow_nest_and_are_shifted(shift: float) -> None:
    flow = FlowSchedule.straight(shift)
    for steps in (1, 2, 4, 8, 16):
        parts = segments(flow.grid(32), flow.grid(steps))
        assert [len(part) for part in parts] == [32 // steps] * steps
    expected = [1000 * shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25)]
    assert flow.grid(4) == pytest.approx(expected)


def test_the_grid_of_sd3_has_whole_times_at_four_steps() -> None:
    grid_of_four = FlowSchedule.straight(3.0).grid(4)
    assert grid_of_four == [1000, 900, 750, 500]
    assert {type(t) for t in grid_of_four} == {int}


@pytest.mark.parametrize("key", ["use_dynamic_shifting", "use_karras_sigmas", "invert_sigmas"])
def test_flow_schedulers_of_other_kinds_are_refused(key: str) -> None:
    with pytest.raises(
        WrongCommand, match=f"the scheduler's {key} is not known here; take a model whose shift is constant"
    ):
        FlowSchedule.from_config({"shift": 3.0, key: True})


def test_times_for_rows_are_whole_or_fractions() -> None:
    z = torch.zeros(3, 2, 2)
    assert (rows_at(999, z).dtype, rows_at(CLEAN, z).dtype, rows_at(12.5, z).dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    assert rows_at(12.5, z).tolist() == [12.5] * 3


@pytest.mark.parametrize(
    ("spacing", "steps", "message"),
    [
        ("karras", 4, "the spacing 'karras' is not known; it may be one of even, leading"),
        ("lcm", 51, "the spacing 'lcm' takes from 1 to 50 steps, the points of its training grid, not 51"),
        ("flow", 4, "the spacing 'flow' is that of a rectified flow, and this model is none; take 'even'"),
        ("trailing", 0, "a grid has from 1 to 999 steps, not 0"),
        ("leading", 1000, "a grid has from 1 to 999 steps, not 1000"),
    ],
)
def test_spacings_that_cannot_be_meant_are_refused(spacing: str, steps: int, message: str) -> None:
    with pytest.raises(WrongCommand) as error:
        timesteps(SD, spacing, steps)
    assert str(error.value).startswith(message)
