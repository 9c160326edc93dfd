"""Every method's run: killed anywhere it is the same run; its student is one that stock diffusers samples."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from ddil_core.diffusion.schedule import CLEAN
from ddil_core.diffusion.solvers import lcm
from ddil_core.distillation.consistency import ConsistencyStage
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching import MatchingStage
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.regression import RegressionStage
from ddil_core.distillation.stage import Stage
from ddil_core.models.loading import load_pipeline
from ddil_core.models.model import load_model
from ddil_core.models.system_specs import Files
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance, normal, rows
from tests.core.distillation.kills import killed_after, same_weights
from tests.pipelines import TEACHER, save_pipeline

DDIL = {
    "uses": 2,
    "collect_every": 3,
    "capacity": 512,
    "phases": [{"until": 0.5, "aggregated": 0.25, "p_teacher": 0.5}, {"until": 1, "aggregated": 0.5, "p_teacher": 0.5}],
}
BASE = {"batch_size": 4, "pool": 12, "warmup": 2, "save_every": 2, "learning_rate": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "lcm": {"method": "lcm", "updates": 6, "w_embedding": 256, "ddil": DDIL},
    "lcm-lora": {"method": "lcm", "updates": 6, "w_embedding": None, "lora": {"rank": 4, "alpha": 8}, "ddil": DDIL},
    "dmd2": {
        "method": "dmd2",
        "updates": 6,
        "critic_updates": 2,
        "teacher_steps": 4,
        "ema_decay": 0.9,
        "gan": {},
        "ddil": DDIL,
    },
    "dmd2-1step": {
        "method": "dmd2",
        "updates": 4,
        "timesteps": [399],
        "critic_updates": 1,
        "gan": {},
        "regression": {"pairs": 8, "teacher_steps": 4, "updates": 4},
    },
}
KILLS: dict[str, list[tuple[type[Stage], int]]] = {
    "lcm": [(ConsistencyStage, 1), (ConsistencyStage, 4)],
    "lcm-lora": [(ConsistencyStage, 3)],
    "dmd2": [(MatchingStage, 0), (MatchingStage, 3)],
    "dmd2-1step": [(RegressionStage, 2), (MatchingStage, 2)],
}
UNET = "unet/diffusion_pytorch_model.safetensors"


def go(teacher: Path, out: Path, name: str, **more: Any) -> Path:
    told = BASE | RUNS[name] | more
    return distill(str(teacher), "shapes", METHODS[told["method"]].config.model_validate(told), out, device="cpu")


@pytest.fixture(scope="module", params=list(RUNS))
def finished(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("methods") / request.param
    go(folder, out, request.param)
    return request.param, out


def test_killed_anywhere_it_ends_with_the_same_weights(
    folder: Path, finished: tuple[str, Path], tmp_path: Path
) -> None:
    name, whole = finished
    for kind, at in KILLS[name]:
        with killed_after(kind, at):
            go(folder, tmp_path / "killed", name)
    go(folder, tmp_path / "killed", name)
    assert same_weights(UNET, tmp_path / "killed", whole)


def test_stock_diffusers_draws_what_our_sampler_draws(finished: tuple[str, Path]) -> None:
    """One step from the same noise, as later ones draw noise of their own."""
    name, out = finished
    student = load_model(str(out))
    z = normal(1, *student.latent_shape)
    first = int(student.sampling.times(student.denoiser.schedule)[0])
    assert first == (399 if name == "dmd2-1step" else 999)
    pipeline = DiffusionPipeline.from_pretrained(out / "student")
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert type(pipeline).__name__ == ("LatentConsistencyModelPipeline" if name == "lcm" else "StableDiffusionPipeline")
    pipeline.set_progress_bar_config(disable=True)
    scale = student.sampling.guidance_scale
    told = {"timesteps": [first]} if first == 399 else {"num_inference_steps": 1}
    theirs = pipeline("a small red circle", guidance_scale=scale, latents=z, output_type="latent", **told).images
    with torch.no_grad():
        x0 = student.guided(scale)(z, rows(first, z), student.encode(["a small red circle"]))
    ours, _ = lcm(student.denoiser.schedule, z, rows(first, z), rows(CLEAN, z), x0, noise=torch.zeros_like(z))
    assert distance(theirs, ours) < 1e-5


def test_the_students_own_timesteps_and_guidance_are_written_down(finished: tuple[str, Path]) -> None:
    name, out = finished
    sampling = load_model(str(out)).sampling
    told = json.loads((out / "student" / "ddil.json").read_text())
    grids = {"dmd2": [999, 749, 499, 249], "dmd2-1step": [399]}
    assert told["grid"] == grids.get(name, [999, 759, 499, 259])
    assert (sampling.solver, sampling.distilled) == ("lcm", True)
    assert sampling.guidance_scale == (8.5 if name == "lcm" else 1.0)


def test_a_loras_weights_go_onto_a_base_in_half_precision(folder: Path, tmp_path: Path) -> None:
    """Stock diffusers gives the adapter the dtype of its network. The base needs its dtype said (docs/distillation.md)."""
    base = tmp_path / "base"
    DiffusionPipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(base)
    shutil.copy(folder / "ddil.json", base)
    assert {tensor.dtype for tensor in load_file(base / UNET).values()} == {torch.float16}
    go(base, tmp_path / "run", "lcm-lora", updates=2)
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    pipeline.scheduler = LCMScheduler.from_pretrained(tmp_path / "run" / "student", subfolder="scheduler")
    latents = normal(1, *load_model(str(base)).latent_shape).half()
    drawn = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipeline("a small red circle", latents=latents, generator=generator, **steps).images)
        if len(drawn) == 1:
            pipeline.load_lora_weights(tmp_path / "run" / "student")
    assert {weight.dtype for weight in pipeline.unet.parameters()} == {torch.float16}
    assert {images.dtype for images in drawn} == {torch.float16} and bool(torch.isfinite(drawn[1]).all())
    assert distance(drawn[0], drawn[1]) > 1e-3


def test_a_loras_weights_go_onto_the_teachers_own_pipeline(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(folder, out, "lcm-lora")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    plain = copy.deepcopy(pipeline.unet)
    pipeline.load_lora_weights(out / "student")
    whole = DiffusionPipeline.from_pretrained(out / "student").unet
    z, t = normal(2, *load_model(str(folder)).latent_shape), torch.tensor([999, 259])
    text = normal(2, 20, 16)
    with torch.no_grad():
        adapted, merged, before = (net(z, t, text).sample for net in (pipeline.unet, whole, plain))
    assert distance(adapted, merged) < 1e-5  # also its α/rank of 2
    assert distance(before, merged) > 1e-5
    lora = out / "student" / "pytorch_lora_weights.safetensors"
    ours = load_pipeline(
        Files(folder, lora=lora), "teacher", "StableDiffusionPipeline", torch.float32
    ).unet.state_dict()
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6)


SSD1B: dict[str, Any] = {  # fewer transformers than SDXL, another number in every block, and a mid-block of its own
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2]],
    "reverse_transformer_layers_per_block": [[2, 1], 1],
}


def with_unet(teacher: Path, **more: Any) -> Path:
    """A pipeline with another U-Net, of its own configuration but for ``more``."""
    torch.manual_seed(1)
    UNet2DConditionModel.from_config(dict(UNet2DConditionModel.load_config(teacher / "unet")) | more).save_pretrained(
        teacher / "unet"
    )
    return teacher


@pytest.mark.parametrize(
    ("name", "unet"), [("lcm", {}), ("dmd2", {}), ("dmd2-1step", {}), ("dmd2", SSD1B)], ids=lambda told: str(told)[:12]
)
def test_an_sdxl_layout_that_predicts_eps(name: str, unet: dict[str, Any], tmp_path: Path) -> None:
    """SDXL's, whose one-step generator has its regression first, and SSD-1B's."""
    layout = "StableDiffusionXLPipeline"
    teacher = save_pipeline(tmp_path / "teacher", TEACHER, seed=1, layout=layout, prediction="epsilon")
    rounded = {"student_dtype": "bfloat16", "teacher_dtype": "bfloat16"}
    out = go(with_unet(teacher, **unet) if unet else teacher, tmp_path / "out", name, updates=2, **rounded)
    student = load_model(str(out.parent))
    assert student.denoiser.prediction == "epsilon"
    assert (student.denoiser.guidance_width == 256) == (name == "lcm")
    assert {p.dtype for p in student.denoiser.net.parameters()} == {torch.float32}
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == layout
    trained = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("*.safetensors"))
    assert ("regression.safetensors" in trained) == (name == "dmd2-1step")


def test_a_discriminator_without_a_mid_block_is_refused(folder: Path, tmp_path: Path) -> None:
    teacher = with_unet(Path(shutil.copytree(folder, tmp_path / "teacher")), mid_block_type=None)
    with pytest.raises(DdilError) as error:
        go(teacher, tmp_path / "out", "dmd2")
    assert str(error.value) == (
        f"the teacher '{teacher}' has a U-Net without a mid-block, which the discriminator reads; say --set gan=null"
    )


def test_what_is_not_installed_is_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddil_core.distillation.processes.find_spec", lambda name: None)
    with pytest.raises(
        WrongCommand, match="the tracker 'wandb' needs a package that is not installed: pip install wandb"
    ):
        go(folder, tmp_path / "tracked", "lcm", trackers=["wandb"])
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(WrongCommand, match="optimizer '8bit' needs the package bitsandbytes"):
        go(folder, tmp_path / "small", "lcm", optimizer="8bit")
