"""A scheduler's configuration: every setting that changes numbers is applied, refused, or reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import encode_pool
from ddil_core.diffusion.parameterization import boundary_scalings
from ddil_core.diffusion.schedule import FlowSchedule, Schedule, transitions
from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.models.model import load_model
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance, normal
from tests.core.diffusion.test_solvers import BETAS, SD, ours, theirs
from tests.pipelines import edited, save_pipeline

SCHEDULER = "scheduler/scheduler_config.json"


def described(scheduler: Any) -> dict[str, Any]:
    return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}


@pytest.mark.parametrize(
    "kind",
    ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler", "IPNDMScheduler"],
)
def test_a_scheduler_without_betas_that_is_no_flow_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    import json

    broken = edited(folder, tmp_path / "model", "model_index.json", scheduler=["diffusers", kind])
    scheduler = getattr(diffusers, kind)(**({"prediction_type": "v_prediction"} if "EDM" in kind else {}))
    (broken / SCHEDULER).write_text(json.dumps(described(scheduler), default=str))
    (broken / "ddil.json").unlink()
    with pytest.raises(DdilError) as error:
        load_model(str(broken))
    assert str(error.value) == (
        f"the scheduler {kind} has no betas and is no rectified flow, so that the model's noise schedule is "
        "not known here; take a "
        "model with a scheduler such as DDIMScheduler or FlowMatchEulerDiscreteScheduler"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "the scheduler's rescale_betas_zero_snr is not known here"),
        ({"use_flow_sigmas": True}, "the scheduler's use_flow_sigmas is not known here"),
        ({"timestep_type": "continuous"}, "the scheduler's timestep_type is not known here"),
        ({"snr_shift_scale": 3.0}, "the scheduler's snr_shift_scale is not known here"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "the scheduler's beta_schedule 'squaredcos_cap_v2' is not known"),
        (
            {"trained_betas": [0.1, 0.2]},
            "the scheduler's configuration holds a value that does not fit (trained_betas are 2",
        ),
        (
            {"trained_betas": [0.1, 1.0], "num_train_timesteps": 2},
            "the scheduler's configuration holds a value that does not",
        ),
        ({"beta_end": float("nan")}, "the scheduler's configuration holds a value that does not fit"),
        ({"beta_start": "small"}, "the scheduler's configuration holds a value that does not fit"),
        ({"num_train_timesteps": None}, "the scheduler's configuration holds a value that does not fit"),
        ({"timestep_scaling": 0}, "the scheduler's timestep_scaling is a finite number above 0, not 0"),
        ({"timestep_scaling": float("inf")}, "the scheduler's timestep_scaling is a finite number above 0, not inf"),
    ],
)
def test_a_process_that_is_not_known_is_refused(keys: dict[str, Any], message: str) -> None:
    Schedule.from_config(BETAS)
    with pytest.raises(WrongCommand) as error:
        Schedule.from_config(BETAS | keys)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys", [{"shift": 0}, {"shift": "large"}, {"shift": float("nan")}, {"num_train_timesteps": 0}]
)
def test_a_flow_with_a_bad_clock_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(WrongCommand, match="^the scheduler's"):
        FlowSchedule.from_config({"shift": 3.0} | keys)


def test_betas_that_were_trained_are_read() -> None:
    betas = torch.linspace(0.01, 0.3, 40).tolist()
    schedule = Schedule.from_config({"trained_betas": betas, "num_train_timesteps": 40})
    expected = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    assert distance(schedule.alphas[:40] ** 2, expected) < 1e-12 and len(schedule) == 40


DPM = "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("kind", "keys", "replaces"),
    [
        (DPM, {}, None),
        (DPM, {"lower_order_final": False}, None),  # of no effect: σ = 0 is reached with first order anyway
        (DPM, {"euler_at_final": True}, None),  # nor this
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        (DPM, {"solver_order": 3}, "solver_order"),
        (DPM, {"solver_type": "heun"}, "solver_type"),
        (DPM, {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        (DPM, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (DPM, {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (DPM, {"use_beta_sigmas": True}, "use_beta_sigmas"),
        (DPM, {"use_lu_lambdas": True}, "use_lu_lambdas"),
        (DPM, {"thresholding": True}, "thresholding"),
        (DPM, {"lambda_min_clipped": -2.0}, "lambda_min_clipped"),
        ("DDIMScheduler", {"clip_sample": False}, None),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("LCMScheduler", {"original_inference_steps": 100}, "original_inference_steps"),
        ("LCMScheduler", {"timestep_scaling": 4.0}, None),  # applied: see below
    ],
)
def test_a_sampler_that_is_not_known_is_replaced_and_that_is_said(
    kind: str, keys: dict[str, Any], replaces: str | None
) -> None:
    sampling = Sampling.from_scheduler(described(getattr(diffusers, kind)(**BETAS, **keys)), 7.5)
    assert sampling.replaces == (None if replaces is None else f"{kind} with {replaces}")


@pytest.mark.parametrize("keys", [{"lower_order_final": False}, {"euler_at_final": True}])
def test_what_is_said_to_be_of_no_effect_is(keys: dict[str, Any]) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, prediction_type="epsilon", steps_offset=1, **keys)
    scheduler.set_timesteps(8)
    z = normal(2, 4, 8, 8)
    times, states = theirs(scheduler, z)
    assert all(distance(a, b) < 1e-5 for a, b in zip(ours("dpmpp_2m", times, z, "epsilon"), states, strict=True))


def test_a_flow_of_another_scheduler_is_replaced_by_one_that_can_start_at_noise() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    sampling = Sampling.from_scheduler(described(scheduler), 7.0)
    assert (sampling.solver, sampling.replaces) == ("flow_euler", "FlowMatchHeunDiscreteScheduler")
    assert len(sampling.transitions(FlowSchedule.from_config(scheduler.config))) == 32


@pytest.mark.parametrize("keys", [{"prediction_type": "flow_prediction"}, {"variance_type": "learned"}])
def test_a_network_that_predicts_something_else_is_refused(keys: dict[str, str], folder: Path, tmp_path: Path) -> None:
    import json

    broken = edited(folder, tmp_path / "model", "model_index.json", scheduler=["diffusers", DPM])
    (broken / SCHEDULER).write_text(
        json.dumps(described(diffusers.DPMSolverMultistepScheduler(**BETAS, **keys)), default=float)
    )
    (broken / "ddil.json").unlink()
    with pytest.raises(DdilError, match="^the model .* which is not supported"):
        load_model(str(broken))


# LCM's factor for timesteps


@pytest.mark.parametrize("scaling", [0.001, 1.0, 10.0])
def test_lcm_samples_with_its_own_scaling_of_timesteps(scaling: float) -> None:
    scheduler = diffusers.LCMScheduler(**BETAS, timestep_scaling=scaling)
    scheduler.set_timesteps(4)
    z, schedule = normal(2, 4, 8, 8), Schedule.from_config(described(scheduler))
    times, states = theirs(scheduler, z, generator=torch.Generator().manual_seed(5))
    result = ours("lcm", times, z, "epsilon", schedule, noise=torch.Generator().manual_seed(5))
    assert all(distance(a, b) < 1e-5 for a, b in zip(result, states, strict=True))
    usual = ours("lcm", times, z, "epsilon", SD, noise=torch.Generator().manual_seed(5))
    assert (distance(result[-1], usual[-1]) > 0.01) == (scaling == 0.001)


def test_the_boundary_is_that_of_diffusers() -> None:
    scheduler = diffusers.LCMScheduler(timestep_scaling=0.3)
    for t in (0, 1, 19, 999):
        result = boundary_scalings(torch.tensor([t]), torch.zeros(1, 1, dtype=torch.float64), 0.3)
        expected = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert [float(c) for c in result] == pytest.approx([float(c) for c in expected])


def test_a_student_keeps_its_teachers_scaling_of_timesteps(tmp_path: Path) -> None:
    import json

    teacher = save_pipeline(tmp_path / "teacher", None, seed=1)
    config = json.loads((teacher / SCHEDULER).read_text())
    (teacher / SCHEDULER).write_text(json.dumps(config | {"_class_name": "LCMScheduler", "timestep_scaling": 0.02}))
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    assert load_model(str(teacher)).denoiser.schedule.timestep_scaling == 0.02
    settings = {"updates": 1, "batch_size": 2, "pool": 4, "w_embedding": 16}
    student = distill(
        str(teacher), "shapes", METHODS["lcm"].config.model_validate(settings), tmp_path / "run", device="cpu"
    )
    assert json.loads((student / SCHEDULER).read_text())["timestep_scaling"] == 0.02
    result = load_model(str(student))
    assert result.denoiser.schedule.timestep_scaling == 0.02 and result.sampling.solver == "lcm"
    assert transitions(result.sampling.times(result.denoiser.schedule))[0] == (999, 759)
    pool = encode_pool(
        load_model(str(teacher)), open_data("shapes"), 4, tmp_path / "run" / "checkpoints" / "data.safetensors"
    )
    assert len(pool) == 4


def test_a_spacing_that_is_no_name_is_replaced_and_said() -> None:
    config = {"_class_name": "DDIMScheduler", "beta_start": 0.0001, "timestep_spacing": ["leading", "trailing"]}
    sampling = Sampling.from_scheduler(config, 7.5)
    assert (sampling.solver, sampling.replaces) == ("dpmpp_2m", "DDIMScheduler")
