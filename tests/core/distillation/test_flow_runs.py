"""Distillations of a flow transformer: killed they are the same run, and stock diffusers samples their students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.distillation.consistency import ConsistencyStage
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching import MatchingStage
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.distillation.regression import RegressionStage
from ddil_core.distillation.stage import Stage
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import load_model
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance
from tests.core.distillation.kills import killed_after, same_weights
from tests.core.distillation.test_methods import BASE, DDIL
from tests.pipelines import save_pipeline
from tests.reference import PROMPTS, run_diffusers

RUNS: dict[str, dict[str, Any]] = {
    "pd": {"method": "pd", "stages": [{"steps": 8, "updates": 3}, {"steps": 4, "updates": 3}], "ddil": DDIL},
    "lcm": {"method": "lcm", "updates": 4, "teacher_steps": 8, "w_embedding": None, "ddil": DDIL},
    "dmd2": {"method": "dmd2", "updates": 4, "critic_updates": 2, "teacher_steps": 8, "gan": {}, "ddil": DDIL},
    "dmd2-1step": {
        "method": "dmd2",
        "updates": 2,
        "timesteps": [399],
        "critic_updates": 1,
        "regression": {"pairs": 8, "teacher_steps": 4, "updates": 2},
    },
}
KILLS: dict[str, tuple[type[Stage], int]] = {
    "pd": (ProgressiveStage, 1),
    "lcm": (ConsistencyStage, 2),
    "dmd2": (MatchingStage, 1),
    "dmd2-1step": (RegressionStage, 1),
}
GRIDS = {"dmd2-1step": [1000 * 3 * 0.4 / (1 + 2 * 0.4)]}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SAMPLES = [Sample(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampling = {"solver": "flow_euler", "steps": None, "guidance_scale": 3.0}
    return save_pipeline(tmp_path_factory.mktemp("flow"), sampling, seed=1, layout="StableDiffusion3Pipeline")


def go(teacher: Path, out: Path, name: str, **more: Any) -> Path:
    told = BASE | RUNS[name] | more
    return distill(str(teacher), "shapes", METHODS[told["method"]].config.model_validate(told), out, device="cpu")


@pytest.fixture(scope="module", params=list(RUNS))
def finished(request: pytest.FixtureRequest, flow: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("flows") / request.param
    go(flow, out, request.param)
    return request.param, out


def test_stock_diffusers_draws_what_our_sampler_draws(finished: tuple[str, Path]) -> None:
    """The scheduler takes the student's own grid without being told. An uneven one needs ``sigmas``, before the shift."""
    name, out = finished
    student = load_model(str(out), "cpu")
    steps = student.sampling.steps
    ours = sample_latents(student, SAMPLES, PROMPTS, resolve_sampling(student), 0)
    pipeline = DiffusionPipeline.from_pretrained(out / "student", text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    kind = "FlowMatchEulerDiscreteScheduler" if name == "pd" else "FlowMatchLCMScheduler"
    assert type(pipeline.scheduler).__name__ == kind
    if name != "pd":  # diffusers' pipeline gives its scheduler no generators
        step, generators = pipeline.scheduler.step, [sample.generator(0, "solver") for sample in SAMPLES]
        pipeline.scheduler.step = lambda *args, **more: step(*args, generator=generators, **more)
    told = {"sigmas": [0.4]} if name == "dmd2-1step" else {"num_inference_steps": steps}
    z = initial_noise(SAMPLES, student.latent_shape, 0)
    theirs, images = run_diffusers(
        pipeline, z, [sample.generator(0, "solver") for sample in SAMPLES], told | {"guidance_scale": 1.0}
    )
    assert distance(ours, theirs) < 1e-5
    assert abs(student.decode(ours).astype(float) - 255 * images).max() < 1
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx(GRIDS.get(name, [1000, 900, 750, 500]))


def test_the_students_files_say_how_it_is_sampled(finished: tuple[str, Path], flow: Path) -> None:
    name, out = finished
    told = json.loads((out / "student" / SYSTEM_FILE).read_text())
    assert told["grid"] == pytest.approx(GRIDS.get(name, [1000, 900, 750, 500]))
    assert (told["prediction"], told["shift"], told["guidance_scale"]) == ("flow", 3.0, 1.0)
    student, teacher = load_model(str(out), "cpu"), load_model(str(flow), "cpu")
    assert (student.sampling.solver, student.sampling.distilled) == ("ddim" if name == "pd" else "lcm", True)
    assert student.denoiser.schedule.grid(4) == teacher.denoiser.schedule.grid(4)
    moved, kept = load_file(out / "student" / WEIGHTS), load_file(flow / WEIGHTS)
    assert moved.keys() == kept.keys() and any(not torch.equal(moved[key], kept[key]) for key in kept)


def test_killed_anywhere_it_ends_with_the_same_weights(finished: tuple[str, Path], flow: Path, tmp_path: Path) -> None:
    name, whole = finished
    with killed_after(*KILLS[name]):
        go(flow, tmp_path / "killed", name)
    go(flow, tmp_path / "killed", name)
    assert same_weights(WEIGHTS, tmp_path / "killed", whole)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            {"teacher_steps": 50},
            "on a flow the student's grid nests in the teacher's where student_steps divides teacher_steps, and 4 does "
            "not divide 50; say --set teacher_steps=48",
        ),
        (
            {"w_embedding": 256},
            "the teacher 'TEACHER' has a transformer, which has no place for LCM's embedding of the guidance; say --set "
            "w_embedding=null, which builds the guidance of guidance_range into the student",
        ),
        (
            {"lora": {"targets": ["conv1"]}},
            "lora.targets names 'conv1', and the network of 'TEACHER' has no linear layer or convolution of this name; name "
            "the ends of layers' names, such as to_q",
        ),
    ],
)
def test_what_a_flow_cannot_take_is_refused(more: dict[str, Any], sentence: str, flow: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongCommand) as error:
        go(flow, tmp_path / "out", "lcm", **more)
    assert str(error.value).replace(str(flow), "TEACHER") == sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pd", "lcm", "dmd2"])
def test_the_velocity_of_instaflow_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """diffusers has no scheduler for it."""
    teacher = Path(shutil.copytree(folder, tmp_path / "teacher"))
    settings = json.loads((teacher / SYSTEM_FILE).read_text())
    (teacher / SYSTEM_FILE).write_text(json.dumps(settings | {"prediction": "rectified_flow"}))
    with pytest.raises(DdilError, match=r"predicts rectified_flow, and .* needs a network that predicts "):
        go(teacher, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()
