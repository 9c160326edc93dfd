"""Every system and every layout, on random weights, against diffusers' own pipelines from the same noise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.schedule import FlowSchedule
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.generate import resolve_sampling, sample_latents, sampling_warnings
from ddil_core.models.model import Model, assemble, load_model
from ddil_core.models.sampling import Sampling, misuse_warnings
from ddil_core.models.system_specs import SystemSpec, load_systems
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance
from tests.pipelines import STUDENT, save_pipeline
from tests.reference import PROMPTS, random_files, reference, run_diffusers

SYSTEMS = load_systems()
SAMPLES = [Sample(prompt) for prompt in PROMPTS]
SEED = 3


def generators() -> list[torch.Generator]:
    return [sample.generator(SEED, "solver") for sample in SAMPLES]


def assert_the_same(model: Model, sampling: Sampling, theirs: tuple[torch.Tensor, Any]) -> None:
    """Compare latents to 1e-5 in norm, and images to one level on average."""
    ours = sample_latents(model, SAMPLES, PROMPTS, sampling, SEED)
    assert distance(ours, theirs[0]) < 1e-5
    images = model.decode(ours)
    assert images.shape == theirs[1].shape == (2, 64, 64, 3)
    assert np.abs(images / 255 - theirs[1]).mean() <= 1 / 255
    assert np.abs(theirs[1][0] - theirs[1][1]).max() > 0.01  # two prompts, two images


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_gives_the_pictures_that_diffusers_gives(name: str, tmp_path: Path) -> None:
    files = random_files(SYSTEMS[name], tmp_path)
    model = assemble(name, files, height=64, width=64)
    z = initial_noise(SAMPLES, model.latent_shape, SEED)
    assert_the_same(model, model.sampling, reference(name, files, z, generators))


LAYOUTS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"num_inference_steps": 8, "guidance_scale": 7.5},
    "StableDiffusionXLPipeline": {"num_inference_steps": 8, "guidance_scale": 5.0},
    "LatentConsistencyModelPipeline": {"num_inference_steps": 4, "guidance_scale": 8.5},
    "StableDiffusion3Pipeline": {"num_inference_steps": 8, "guidance_scale": 7.0},
}


@pytest.mark.parametrize(
    ("layout", "t5"), [*((layout, False) for layout in LAYOUTS), ("StableDiffusion3Pipeline", True)]
)
def test_a_folder_is_sampled_as_its_own_scheduler_says(layout: str, t5: bool, tmp_path: Path) -> None:
    import diffusers

    folder = save_pipeline(tmp_path, None, seed=1, layout=layout, t5=t5)
    model = load_model(str(folder))
    absent = {"text_encoder_3": None, "tokenizer_3": None} if layout == "StableDiffusion3Pipeline" and not t5 else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == layout
    z = initial_noise(SAMPLES, model.latent_shape, SEED)
    call = LAYOUTS[layout]
    assert model.sampling.guidance_scale == call["guidance_scale"]
    theirs = run_diffusers(pipeline, z, generators(), call)
    assert_the_same(model, resolve_sampling(model, steps=call["num_inference_steps"]), theirs)


# Conditions


def test_sdxl_is_guided_away_from_zeros_or_from_the_empty_prompt(tmp_path: Path) -> None:
    model = load_model(str(save_pipeline(tmp_path, None, seed=1, layout="StableDiffusionXLPipeline")))
    nothing, empty = model.nothing().tensors, model.encode([""]).tensors
    assert set(nothing) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    assert not nothing["encoder_hidden_states"].any() and not nothing["text_embeds"].any()
    assert nothing["time_ids"].tolist() == empty["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    for name, tensor in dataclasses.replace(model).nothing().tensors.items():
        torch.testing.assert_close(tensor, empty[name])


def test_lcm_takes_its_guidance_as_an_embedding_in_one_evaluation(tmp_path: Path) -> None:
    model = load_model(str(save_pipeline(tmp_path, None, seed=1, layout="LatentConsistencyModelPipeline")))
    z, t = initial_noise(SAMPLES, model.latent_shape, SEED), torch.tensor([999, 259])
    condition = model.encode(PROMPTS)
    weak, strong = model.guided(1.0), model.guided(8.0)
    assert (weak.nfe, strong.nfe) == (1, 1)
    embedding = model.pipeline.get_guidance_scale_embedding(torch.tensor([7.0, 7.0]), embedding_dim=256)
    with torch.no_grad():
        eps = model.pipeline.unet(z, t, condition.tensors["encoder_hidden_states"], timestep_cond=embedding).sample
        expected = model.denoiser.x0(eps, z, t)
        assert distance(strong(z, t, condition), expected) < 1e-6
        assert distance(weak(z, t, condition), expected) > 1e-4


def test_a_lora_is_merged_or_kept_with_the_same_pictures(tmp_path: Path) -> None:
    files = random_files(SYSTEMS["lcm-lora"], tmp_path)
    fused, kept = assemble("lcm-lora", files), assemble("lcm-lora", files, fuse_lora=False)
    bare = assemble("lcm-lora", dataclasses.replace(files, lora=None))
    assert not hasattr(fused.denoiser.net, "peft_config") and "default_0" in kept.denoiser.net.peft_config
    drawn = [sample_latents(model, SAMPLES, PROMPTS, model.sampling, SEED) for model in (fused, kept, bare)]
    assert distance(drawn[1], drawn[0]) < 1e-5
    assert distance(drawn[2], drawn[0]) > 1e-3
    assert len({model.weights_sha256() for model in (fused, bare)}) == 2


def test_flows_are_flows_and_the_rest_is_not(tmp_path: Path) -> None:
    for name, shift in (("instaflow", 1.0), ("sd15", None)):
        schedule = assemble(name, random_files(SYSTEMS[name], tmp_path / name)).denoiser.schedule
        assert (schedule.shift if isinstance(schedule, FlowSchedule) else None) == shift


def test_sd3_reads_its_t5_where_it_has_one(tmp_path: Path) -> None:
    layout = "StableDiffusion3Pipeline"
    bare, whole = (
        load_model(str(save_pipeline(tmp_path / str(t5), None, seed=1, layout=layout, t5=t5))) for t5 in (False, True)
    )
    limit = bare.pipeline.tokenizer.model_max_length
    a, b = (model.encode(PROMPTS).tensors["encoder_hidden_states"] for model in (bare, whole))
    assert a.shape == b.shape == (2, limit + 256, 40)
    assert not a[:, limit:].any() and bool(b[:, limit:].any())
    long = "red " * 300
    assert (whole.cut([long, "red"]), whole.pipeline.tokenizer_3(long).input_ids[256:] != []) == (1, True)


# What does not fit


def test_a_row_of_guidance_by_embedding_needs_a_unet_that_takes_it(tmp_path: Path) -> None:
    plain = random_files(SYSTEMS["sd15"], tmp_path)
    with pytest.raises(DdilError) as error:
        assemble("lcm:folder", dataclasses.replace(plain, system=SYSTEMS["lcm"]))
    assert str(error.value) == (
        "the model 'lcm:folder' has a U-Net without a guidance embedding, and its row in systems.yaml says one of "
        "width 256; name the files of that system"
    )


def test_a_student_with_a_scheduler_of_another_prediction_is_refused(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path, STUDENT | {"prediction": "v_prediction"}, seed=2)
    assert load_model(str(folder)).denoiser.prediction == "v_prediction"
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(DdilError) as error:
        load_model(str(folder))
    assert str(error.value) == (
        f"the model '{folder}' was trained to predict v_prediction, and its scheduler/scheduler_config.json says "
        "epsilon; set its prediction_type to v_prediction"
    )


def test_a_multistep_solver_cannot_start_where_a_flow_does(tmp_path: Path) -> None:
    model = load_model(str(save_pipeline(tmp_path, None, seed=1, layout="StableDiffusion3Pipeline")))
    with pytest.raises(
        WrongCommand, match="the solver 'dpmpp_2m' works with .* infinite where a flow starts; use 'flow_euler'"
    ):
        resolve_sampling(model, solver="dpmpp_2m")


# Warnings


def test_a_student_sampled_as_it_was_not_made_for_is_said(tmp_path: Path) -> None:
    student = load_model(str(save_pipeline(tmp_path / "s", STUDENT, seed=2)))
    assert student.sampling.distilled
    for fits in (resolve_sampling(student), resolve_sampling(student, 4, "euler", 1.0)):  # Euler takes DDIM's step
        assert sampling_warnings(student, PROMPTS, fits) == []
    name = repr(student.reference)
    assert sampling_warnings(student, PROMPTS, resolve_sampling(student, 8, "dpmpp_2m", 7.5)) == [
        f"{name} was made for the solver 'ddim', not 'dpmpp_2m': say --solver ddim",
        f"{name} was made for 4 steps, not 8: say --steps 4",
        f"{name} was made for guidance 1, not 7.5: say --guidance 1",
    ]
    teacher = load_model(str(save_pipeline(tmp_path / "t", {"solver": "ddim", "guidance_scale": 3.0}, seed=2)))
    assert sampling_warnings(teacher, PROMPTS, resolve_sampling(teacher, 8, "dpmpp_2m", 7.5)) == []


@pytest.mark.parametrize(
    ("config", "replaces"),
    [
        ({"_class_name": "PNDMScheduler", "timestep_spacing": "leading"}, "PNDMScheduler"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_karras_sigmas": True},
            "EulerDiscreteScheduler with use_karras_sigmas",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace", "solver_order": 3},
            "DPMSolverMultistepScheduler with solver_order",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace", "solver_order": 2}, None),
    ],
)
def test_a_scheduler_that_is_not_known_gives_way_and_that_is_said(config: dict[str, Any], replaces: str | None) -> None:
    sampling = Sampling.from_scheduler(config, 7.5)
    assert (sampling.solver, sampling.spacing, sampling.replaces) == ("dpmpp_2m", "even", replaces)


def test_what_comes_with_another_scheduler_or_turns_its_prompt_off_is_said(tmp_path: Path) -> None:
    model = assemble("sd15", dataclasses.replace(random_files(SYSTEMS["sd15"], tmp_path), system=None))
    assert sampling_warnings(model, PROMPTS, resolve_sampling(model)) == [
        "'sd15' comes with PNDMScheduler, which is not known here; dpmpp_2m is in its place"
    ]
    assert sampling_warnings(model, PROMPTS, resolve_sampling(model, solver="ddim", guidance_scale=0.0)) == [
        "guidance below 1 turns the prompt down, and 0 turns it off; where a page writes 0 for no guidance, say --guidance 1"
    ]


def test_a_range_of_steps_is_what_it_was_made_for() -> None:
    lora = Sampling.from_system(SYSTEMS["lcm-lora"], 7.5)
    used = [dataclasses.replace(lora, steps=steps) for steps in (1, 2, 8, 9)]
    assert [misuse_warnings(lora, one) for one in used] == [
        ["was made for 2 to 8 steps, not 1: say --steps 4"],
        [],
        [],
        ["was made for 2 to 8 steps, not 9: say --steps 4"],
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_that_are_cut_are_counted(layout: str, tmp_path: Path) -> None:
    model = load_model(str(save_pipeline(tmp_path, None, seed=1, layout=layout)))
    limit = model.pipeline.tokenizer.model_max_length
    prompts = ["red " * (limit - 2), "red " * (limit - 1), "red", "red " * (limit - 1)]
    assert model.cut(prompts) == 2
    assert sampling_warnings(model, prompts, model.sampling) == [
        "2 of 4 prompts are longer than the text encoder takes; the rest of each is not read"
    ]


# The rows


def test_rows_of_solvers_spacings_and_layouts_exist() -> None:
    from ddil_core.models.layouts import LAYOUTS as KNOWN

    for system in SYSTEMS.values():
        assert system.layout in KNOWN and system.solver in SOLVERS
        sampling = Sampling.from_system(system, 5.0)
        schedule = FlowSchedule.straight() if system.prediction == "rectified_flow" else None
        assert sampling.guidance_scale == (5.0 if system.guidance_scale is None else system.guidance_scale)
        if schedule is not None:
            assert sampling.times(schedule) == [1000]
    assert set(SYSTEMS) == {
        *("sd15", "sd21", "add", "lcm", "lcm-lora", "lcm-lora-ssd1b", "instaflow", "dmd", "dmd2", "dmd2-1step"),
        *("ssd1b", "sdxl", "sd3", "sd35", "flux-dev", "flux-schnell", "sana", "pixart-sigma"),
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "x", "unet": {"source": "a/b", "file": "c"}}, "must name the 'base' with the pipeline for them"),
        ({"title": "x", "steps": 2, "timesteps": [999]}, "'steps' is 2, and there are 1 'timesteps'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SystemSpec.model_validate(row)
