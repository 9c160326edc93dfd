"""Each format is loaded again by diffusers and by ComfyUI's formulas, and draws what ``ddil sample`` draws."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddil_core.diffusion.noise import Sample, initial_noise, solver_noise
from ddil_core.export.export import Exported, export, prepare
from ddil_core.export.finished import FinishedRun, open_finished
from ddil_core.export.single_file import original_weights
from ddil_core.export.stock import stock_call
from ddil_core.models.generate import sample_latents
from ddil_core.models.layouts import LAYOUTS
from ddil_core.models.lora import BASE_SHA256, read_lora
from ddil_core.models.model import load_model
from ddil_core.models.weights import read_metadata
from tests import comfyui
from tests.core.closed_form import distance
from tests.core.export.conftest import RUNS
from tests.pipelines import build
from tests.single_file import single_file

Runs = Callable[[str], Path]
TEXTS = ["a small red circle", "a large blue star on a grey background"]
SAMPLES = [Sample(text) for text in TEXTS]


def exported(run: Path, to: str, out: Path, **more: Any) -> tuple[FinishedRun, Exported]:
    finished, options = prepare(run, to, out, "student", **more)
    return finished, export(finished, options, to, out)


def ours(run: FinishedRun) -> Tensor:
    return sample_latents(run.model, SAMPLES, TEXTS, run.sampling, seed=0)


def stock(pipeline: Any, run: FinishedRun) -> Tensor:
    """diffusers' latents of the same noise, by the call that the card prints."""
    pipeline.set_progress_bar_config(disable=True)
    z = initial_noise(SAMPLES, run.model.latent_shape, 0)
    generators = [sample.generator(0, "solver") for sample in SAMPLES]
    call = stock_call(run).arguments
    drawn: Tensor = pipeline(TEXTS, latents=z, generator=generators, output_type="latent", **call).images
    return drawn


# A pipeline folder


@pytest.mark.parametrize("name", RUNS)
def test_a_pipeline_folder_draws_the_same(name: str, runs: Runs, tmp_path: Path) -> None:
    run, done = exported(runs(name), "diffusers", tmp_path / "student")
    pipeline = loaded(done, run)
    assert distance(stock(pipeline, run), ours(run)) < 1e-5
    again = load_model(str(done.folder))  # also checks the checksums
    assert again.sampling == run.sampling
    assert again.weights_sha256() == done.weights_sha256  # records of the run are records of the export
    assert "pytorch_lora_weights.safetensors" not in done.files


def loaded(done: Exported, run: FinishedRun) -> Any:
    """The pipeline, by the line of the card."""
    (line,) = re.findall(r"^pipeline = (.*)$", (done.folder / "README.md").read_text(), flags=re.MULTILINE)
    call = f'pipeline("a prompt", {stock_call(run).text()})'
    assert call in (done.folder / "README.md").read_text()
    return eval(line, {"DiffusionPipeline": _In(done.folder.parent)})


class _In:
    """``DiffusionPipeline``, which finds folders beside the export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def from_pretrained(self, name: str, **options: Any) -> Any:
        return DiffusionPipeline.from_pretrained(self.folder / name, **options)


def test_the_number_of_steps_alone_gives_the_students_grid(runs: Runs) -> None:
    """The run's own DDIMScheduler takes 999, 749, 499, 249, and its LCMScheduler 999, 759, 499, 259."""
    for name, grid in {"pd": [999, 749, 500, 250], "dmd2": [999, 749, 499, 249], "lora": [999, 759, 499, 259]}.items():
        call = stock_call(open_finished(runs(name)))
        assert call.arguments == {"num_inference_steps": 4, "guidance_scale": 1.0}
        call.scheduler.set_timesteps(4)
        assert call.scheduler.timesteps.tolist() == grid


def test_a_grid_of_its_own_is_named_in_the_call(runs: Runs) -> None:
    run = open_finished(runs("dmd2"))
    run.sampling = type(run.sampling)("lcm", 1, timesteps=(399,))
    assert stock_call(run).arguments == {"timesteps": [399], "guidance_scale": 1.0}


def test_a_grid_before_the_shift_is_named_for_a_flow(runs: Runs) -> None:
    run = open_finished(runs("sd3"))
    assert run.times == [1000, 900, 750, 500]
    run.sampling = type(run.sampling)("lcm", 1, timesteps=(2000 / 3,))
    call = stock_call(run)
    assert call.arguments["sigmas"] == [pytest.approx(0.4)]  # the shift is 3
    call.scheduler.set_timesteps(sigmas=call.arguments["sigmas"])
    assert call.scheduler.timesteps.tolist() == pytest.approx([2000 / 3])


def test_flux_gives_its_scheduler_even_times_before_the_shift(runs: Runs) -> None:
    """SD3's pipeline gives its scheduler a number of steps. The two need different schedulers for the same grid."""
    run = open_finished(runs("sd3"))
    saved = stock_call(run).scheduler
    run.layout = LAYOUTS["FluxPipeline"]
    call = stock_call(run)
    assert call.arguments["num_inference_steps"] == 4
    saved.set_timesteps(4)
    call.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    assert call.scheduler.timesteps.tolist() == pytest.approx(run.times) == saved.timesteps.tolist()
    saved.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    assert saved.timesteps.tolist() != pytest.approx(run.times)


# One checkpoint file


@pytest.mark.parametrize(("name", "version"), [("pd", "1"), ("dmd2", "1"), ("lora", "1"), ("xl-pd", "xl")])
def test_a_single_file_draws_the_same(name: str, version: str, runs: Runs, tmp_path: Path) -> None:
    run, done = exported(runs(name), "single-file", tmp_path / "out")
    file, config = done.folder / "student.safetensors", done.folder / "config"
    pipeline = getattr(diffusers, run.layout.pipeline).from_single_file(str(file), config=str(config))
    assert type(pipeline.scheduler) is type(stock_call(run).scheduler)
    assert pipeline.scheduler.config.prediction_type == run.prediction
    assert distance(stock(pipeline, run), ours(run)) < 1e-5
    written, wanted = load_file(file), single_file(run.model.pipeline, version)
    assert written.keys() == wanted.keys() | ({"v_pred"} if run.prediction == "v_prediction" else set())
    assert all(torch.equal(written[key], tensor) for key, tensor in wanted.items())
    again = load_model(f"{config}:{file}")
    assert (again.sampling, again.denoiser.prediction) == (run.sampling, run.prediction)
    assert again.files.prediction == run.prediction  # the file itself says it


def test_a_single_file_of_version_2(tmp_path: Path) -> None:
    """Its text encoder is OpenCLIP's: query, key and value in one matrix."""
    pipeline = build("StableDiffusionPipeline", tmp_path)
    pipeline.text_encoder.config.hidden_act = "gelu"
    written, wanted = original_weights(pipeline), single_file(pipeline, "2")
    assert written.keys() == wanted.keys() and any("in_proj_weight" in key for key in wanted)
    assert all(torch.equal(written[key], tensor) for key, tensor in wanted.items())


# A LoRA


@pytest.mark.parametrize("name", ["lora", "xl-lora"])
def test_a_lora_draws_the_same_in_both_layouts(
    name: str, runs: Runs, teachers: Callable[[str], Path], tmp_path: Path
) -> None:
    run, done = exported(runs(name), "lora", tmp_path / "out")
    base = teachers(RUNS[name][0])
    wanted = ours(run)
    assert {read_metadata(done.folder / file)[BASE_SHA256] for file in _files(done)} == {run.content["teacher_sha256"]}
    changes = [read_lora(run.model.pipeline, done.folder / file, name) for file in _files(done)]
    for before, after in zip(*(sorted(read, key=lambda c: c.layer) for read in changes), strict=True):
        assert (before.component, before.layer) == (after.component, after.layer)
        torch.testing.assert_close(before.delta, after.delta, rtol=1e-6, atol=1e-9)
    for file in _files(done):
        pipeline = DiffusionPipeline.from_pretrained(base)
        pipeline.scheduler = type(stock_call(run).scheduler).from_pretrained(done.folder, subfolder="scheduler")
        plain = stock(pipeline, run)
        pipeline.load_lora_weights(done.folder, weight_name=file)
        assert distance(stock(pipeline, run), wanted) < 1e-5
        assert distance(plain, wanted) > 1e-3


def test_a_lora_of_a_transformer_has_diffusers_layout_alone(
    runs: Runs, teachers: Callable[[str], Path], tmp_path: Path
) -> None:
    run, done = exported(runs("sd3"), "lora", tmp_path / "out")
    assert "student.safetensors" not in done.files
    pipeline = DiffusionPipeline.from_pretrained(teachers("sd3"), text_encoder_3=None, tokenizer_3=None)
    pipeline.scheduler = type(stock_call(run).scheduler).from_pretrained(done.folder, subfolder="scheduler")
    pipeline.load_lora_weights(done.folder)
    assert distance(stock(pipeline, run), ours(run)) < 1e-5


@pytest.mark.parametrize(("name", "to"), [("lora", "lora"), ("lora", "single-file"), ("pd", "diffusers")])
def test_no_file_names_a_path_of_the_machine(name: str, to: str, runs: Runs, tmp_path: Path) -> None:
    run, done = exported(runs(name), to, tmp_path / "out")
    place = run.content["teacher"].encode()
    assert Path(run.content["teacher"]).is_absolute()
    assert [file for file in done.files if place in (done.folder / file).read_bytes()] == []


def _files(done: Exported) -> tuple[str, str]:
    return "pytorch_lora_weights.safetensors", "student.safetensors"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("lora", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("lora", "lora_unet_down_blocks_1_resnets_0_conv1"),
        ("xl-lora", "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"),
        ("xl-lora", "lora_unet_input_blocks_3_0_in_layers_2"),
    ],
)
def test_kohyas_names_and_alphas(name: str, layer: str, runs: Runs, tmp_path: Path) -> None:
    """kohya's scripts name the layers of Stable Diffusion as diffusers does, and those of SDXL as its authors did."""
    _, done = exported(runs(name), "lora", tmp_path / "out")
    with safe_open(done.folder / "student.safetensors", "pt") as file:
        assert file.get_tensor(f"{layer}.alpha").item() == 4
        down, up = (file.get_tensor(f"{layer}.lora_{side}.weight") for side in ("down", "up"))
        assert file.metadata()["ss_network_alpha"] == "4"
    assert (len(down), up.shape[1], up.ndim) == (4, 4, down.ndim)


# A workflow of ComfyUI


@pytest.mark.parametrize("name", ["pd", "dmd2", "lora", "xl-pd", "xl-lora"])
def test_a_workflow_draws_the_same(name: str, runs: Runs, teachers: Callable[[str], Path], tmp_path: Path) -> None:
    more = {"checkpoint": "base.safetensors"} if name.endswith("lora") else {}
    run, done = exported(runs(name), "comfyui", tmp_path / "out", **more)
    workflow = json.loads((done.folder / "workflow.json").read_text())
    assert comfyui.faults(workflow) == []
    clock = comfyui.Clock()
    assert [clock.timestep(sigma) for sigma in comfyui.parsed_sigmas(workflow)[:-1]] == run.times
    unet = _loaded(workflow, run, done, teachers(RUNS[name][0]), tmp_path)
    condition = run.model.encode(TEXTS).tensors
    sized = {key: condition[key] for key in ("text_embeds", "time_ids") if key in condition}

    def network(z: Tensor, t: Tensor) -> Tensor:
        out: Tensor = unet(z, t, condition["encoder_hidden_states"], added_cond_kwargs=sized or None).sample
        return out

    shape = run.model.latent_shape
    z, noise = initial_noise(SAMPLES, shape, 0), solver_noise(SAMPLES, shape, 0, len(run.times))
    assert distance(comfyui.sample(workflow, network, z, noise), ours(run)) < 1e-5
    empty = comfyui.inputs_of(workflow, "EmptyLatentImage")
    assert (empty["height"] // 8, empty["width"] // 8) == shape[1:]


def test_which_of_comfyuis_schedulers_have_a_students_grid() -> None:
    clock = comfyui.Clock()
    grids = {"pd": [999, 749, 500, 250], "lcm": [999, 759, 499, 259], "dmd2": [999, 749, 499, 249]}
    levels = {kind: getattr(clock, kind)(4) for kind in ("simple", "sgm_uniform", "ddim_uniform")}
    same = {(n, k) for n, grid in grids.items() for k, s in levels.items() if torch.allclose(clock.sigmas[grid], s)}
    assert same == {("dmd2", "simple")}


def _loaded(workflow: comfyui.Workflow, run: FinishedRun, done: Exported, base: Path, scratch: Path) -> Any:
    """The U-Net of the files that the workflow names, as diffusers loads them."""
    checkpoint = comfyui.inputs_of(workflow, "CheckpointLoaderSimple")["ckpt_name"]
    if run.lora is None:
        file = done.folder / "models" / "checkpoints" / checkpoint
        kind = getattr(diffusers, run.layout.pipeline)
        return kind.from_single_file(str(file), config=str(run.student)).unet
    assert checkpoint == "base.safetensors"
    pipeline = DiffusionPipeline.from_pretrained(base)
    named = comfyui.inputs_of(workflow, "LoraLoaderModelOnly")
    pipeline.load_lora_weights(done.folder / "models" / "loras", weight_name=named["lora_name"])
    assert named["strength_model"] == 1.0
    return pipeline.unet
