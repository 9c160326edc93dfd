"""Distillations of FLUX.1, SANA and PixArt-Σ at a size that is no square; diffusers' pipelines sample their students."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.transformers import from_tokens, to_tokens
from ddil_core.distillation.critic import Critic
from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import load_model
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance, normal
from tests.core.distillation.test_methods import DDIL
from tests.pipelines import build
from tests.reference import PROMPTS

SIZE = {"height": 64, "width": 96}
BASE = {"batch_size": 2, "pool": 6, "warmup": 0, "learning_rate": 1e-3} | SIZE
SAMPLES = [Sample(prompt) for prompt in PROMPTS]
LAYOUTS = {"FLUX.1": "FluxPipeline", "SANA": "SanaPipeline", "PixArt-Σ": "PixArtSigmaPipeline"}
LCM: dict[str, Any] = {"updates": 2, "teacher_steps": 20, "w_embedding": None}
DMD2: dict[str, Any] = {"method": "dmd2", "updates": 2, "critic_updates": 1, "teacher_steps": 4, "gan": {}}
LORA = {"rank": 2}
METHOD: dict[str, dict[str, Any]] = {
    "pd": {"method": "pd", "stages": [{"steps": 4, "updates": 2}], "ddil": DDIL},
    "pd-convert": {"method": "pd", "stages": [{"steps": 4, "updates": 2}], "convert": {"updates": 2}, "ddil": DDIL},
    "lcm": {"method": "lcm", "student_steps": 5, "ddil": DDIL} | LCM,
    "tcd": {"method": "tcd", "ddil": DDIL} | LCM,
    "dmd2": DMD2 | {"ddil": DDIL},
    "pd-lora": {"method": "pd", "stages": [{"steps": 4, "updates": 2}], "lora": LORA},
    "lcm-lora": {"method": "lcm", "lora": LORA} | LCM,
    "dmd2-lora": DMD2 | {"lora": LORA},
}
RUNS = {
    "FLUX.1": ("pd", "lcm", "dmd2", "pd-lora", "dmd2-lora"),
    "SANA": ("pd", "lcm", "dmd2", "lcm-lora"),
    "PixArt-Σ": ("pd-convert", "lcm", "tcd", "dmd2"),
}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Folders of teachers. FLUX.1 reads no guidance, as schnell, and shifts its times by the size, as dev."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("teacher")
        pipeline = build(LAYOUTS[name], folder / "words", distilled=True)
        if name == "FLUX.1":
            pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
        pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
        return folder / "pipeline"

    return make


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE.values(), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a small red circle")
    return f"folder:{folder}"


def go(teacher: Path, data: str, out: Path, method: str, **more: Any) -> Path:
    told = BASE | METHOD[method] | more
    return distill(str(teacher), data, METHODS[told["method"]].config.model_validate(told), out, device="cpu")


def stock(folder: Path, shape: tuple[int, int, int], steps: int) -> tuple[Tensor, list[float]]:
    """The latents of diffusers' pipeline in a folder, and the times of its scheduler."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z, generators = initial_noise(SAMPLES, shape, 0), [sample.generator(0, "solver") for sample in SAMPLES]
    told = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"} | SIZE
    if type(pipeline.scheduler).__name__ in ("LCMScheduler", "TCDScheduler"):
        told |= {"timesteps": json.loads((folder / SYSTEM_FILE).read_text())["grid"], "eta": 0.3}  # γ
    kind = type(pipeline).__name__
    told |= {"max_sequence_length": 256} if kind == "FluxPipeline" else {"use_resolution_binning": False}
    if kind == "PixArtSigmaPipeline":
        told["clean_caption"] = False
    if kind != "FluxPipeline":
        drawn = pipeline(PROMPTS, latents=z, generator=generators, **told).images
        return drawn, pipeline.scheduler.timesteps.tolist()
    rows, step = (shape[1] // 2, shape[2] // 2), pipeline.scheduler.step
    noise = {"generator": generators} if type(pipeline.scheduler).__name__ == "FlowMatchLCMScheduler" else {}

    def unpacked(output: Tensor, t: Tensor, latents: Tensor, **more: Any) -> tuple[Tensor]:
        """FLUX's pipeline gives its scheduler no generators, which here draw the noise of latents, not of tokens."""
        return (to_tokens(step(from_tokens(output, *rows), t, from_tokens(latents, *rows), **noise, **more)[0]),)

    pipeline.scheduler.step = unpacked
    drawn = pipeline(PROMPTS, latents=to_tokens(z), **told).images
    return from_tokens(drawn, *rows), pipeline.scheduler.timesteps.tolist()


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, methods in RUNS.items() for method in methods])
def test_diffusers_draws_what_our_sampler_draws(
    name: str, method: str, teachers: Saved, photographs: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    student = go(teachers(name), photographs, out, method)
    model, teacher = load_model(str(out), "cpu"), load_model(str(teachers(name)), "cpu", **SIZE)
    told = json.loads((student / SYSTEM_FILE).read_text())
    assert {side: told[side] for side in SIZE} == SIZE and model.latent_shape == teacher.latent_shape
    assert told["grid"] == pytest.approx(model.sampling.times(teacher.denoiser.schedule))
    sampling = resolve_sampling(model)
    theirs, times = stock(student, model.latent_shape, len(told["grid"]))
    if method == "pd-convert":  # diffusers' DDIMScheduler has no grid 999, 749, 500, 250
        sampling = replace(sampling, timesteps=tuple(times))
    assert sampling.times(model.denoiser.schedule) == pytest.approx(times)
    assert distance(sample_latents(model, SAMPLES, PROMPTS, sampling, 0), theirs) < 1e-5
    moved, kept = load_file(student / WEIGHTS), load_file(teachers(name) / WEIGHTS)
    assert moved.keys() == kept.keys() and any(not torch.equal(moved[key], kept[key]) for key in kept)
    if "lora" in method:
        adapters = load_file(student / "pytorch_lora_weights.safetensors")
        assert any("attn" in key and tensor.any() for key, tensor in adapters.items() if "lora_B" in key)


def test_students_of_sana_read_fractional_times(
    teachers: Saved, photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own scheduler gives whole times. Those of students do not, so that students are trained at their own times."""
    kind = type(load_model(str(teachers("SANA")), "cpu").denoiser)
    call, read = kind.call, list[Tensor]()
    monkeypatch.setattr(kind, "call", lambda net, z, t, inputs: (read.append(t), call(net, z, t, inputs))[1])
    go(teachers("SANA"), photographs, tmp_path / "run", "lcm", ddil=None)
    times = torch.cat([t.double() for t in read])
    schedule = load_model(str(tmp_path / "run"), "cpu").denoiser.schedule
    grid = torch.tensor(schedule.grid(20), dtype=torch.float64)
    assert bool((times[:, None] - grid).abs().amin(1).max() < 1e-3) and bool((times != times.floor()).any())


def test_the_discriminator_reads_the_image_in_the_middle_of_flux(teachers: Saved) -> None:
    """Half of its blocks come before: here one for text and image each, and one for both."""
    model = load_model(str(teachers("FLUX.1")), "cpu", **SIZE)
    critic, tokens = Critic(model.denoiser, (8, 12)).eval(), list[Tensor]()
    model.denoiser.net.single_transformer_blocks[0].register_forward_hook(lambda _, args, out: tokens.append(out[1]))
    z, t = normal(2, *model.latent_shape), torch.tensor([1000.0, 500.0])
    _, logits = critic(z, t, model.encode(PROMPTS))
    assert tokens[0].shape == (2, 24, 16)  # 4 rows of 6 patches; two heads of 8 features
    rows = torch.stack([tokens[0][:, 6 * y : 6 * y + 6] for y in range(4)], 1)  # [B, y, x, C]
    torch.testing.assert_close(logits, critic.head(rows.permute(0, 3, 1, 2)).flatten())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_network_that_several_processes_train_is_called_alike(name: str, teachers: Saved) -> None:
    """Its wrapper, as DDP's, hides its configuration."""

    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **inputs: Any) -> Any:
            return self.module(*args, **inputs)

    model = load_model(str(teachers(name)), "cpu", **SIZE)
    own, condition = model.denoiser, model.encode(PROMPTS)
    wrapped = type(own)(Wrapped(own.net), own.schedule, own.prediction)
    assert wrapped.reads_guidance == own.reads_guidance and wrapped.config == own.config
    z, t = normal(2, *model.latent_shape), torch.tensor([900, 500])
    with torch.no_grad():
        assert torch.equal(wrapped.output(z, t, condition), own.output(z, t, condition))


@pytest.mark.parametrize(
    ("name", "method", "more", "kind", "sentence"),
    [
        (
            "SANA",
            "tcd",
            {},
            DdilError,
            "the teacher 'TEACHER' predicts flow, and trajectory consistency distillation needs a network that predicts "
            "ε, v or x₀; distil a flow by pd, lcm or dmd2",
        ),
        (
            "PixArt-Σ",
            "dmd2-lora",
            {},
            WrongCommand,
            "diffusers has no LoRA for the network of 'TEACHER', PixArtTransformer2DModel; leave the LoRA out",
        ),
        (
            "PixArt-Σ",
            "tcd",
            {"condition_on_s": True},
            WrongCommand,
            "condition_on_s adds an embedding to a U-Net without classes, which 'TEACHER' has not; say --set "
            "condition_on_s=false",
        ),
    ],
)
def test_what_a_teacher_cannot_take_is_refused(
    name: str, method: str, more: dict[str, Any], kind: type[DdilError], sentence: str,
    teachers: Saved, photographs: str, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(DdilError) as error:
        go(teachers(name), photographs, tmp_path / "run", method, **more)
    assert type(error.value) is kind
    assert str(error.value).replace(str(teachers(name)), "TEACHER") == sentence
    assert not (tmp_path / "run").exists()
