"""The layouts of today's transformers, on random weights, against diffusers' own pipelines from the same noise."""

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

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.schedule import FlowSchedule
from ddil_core.diffusion.transformers import from_tokens, to_tokens, token_places
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.memory import tiles
from ddil_core.models.model import Model, load_model
from tests.core.closed_form import distance, normal
from tests.pipelines import build, tiny_transformer
from tests.reference import PROMPTS, run_diffusers

SAMPLES = [Sample(prompt) for prompt in PROMPTS]
SEED = 3
WIDE = (64, 96)
CALLS: dict[str, dict[str, Any]] = {
    "FLUX.1-dev": {"num_inference_steps": 4, "guidance_scale": 3.5},
    "FLUX.1-schnell": {"num_inference_steps": 2, "guidance_scale": 0.0, "max_sequence_length": 256},
    "PixArt-Σ": {"num_inference_steps": 6, "guidance_scale": 4.5},
    "SANA": {"num_inference_steps": 6, "guidance_scale": 4.5},
    "SD 3.5": {"num_inference_steps": 4, "guidance_scale": 7.0},
}
LAYOUTS = {
    "FLUX.1-dev": "FluxPipeline",
    "FLUX.1-schnell": "FluxPipeline",
    "PixArt-Σ": "PixArtSigmaPipeline",
    "SANA": "SanaPipeline",
    "SD 3.5": "StableDiffusion3Pipeline",
}


def made(name: str, words: Path) -> Any:
    """A pipeline; SD 3.5's has normalised queries, a second attention, and times that depend on the size."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = build(LAYOUTS[name], words, distilled=name == "FLUX.1-schnell")
    if name == "SD 3.5":
        torch.manual_seed(1)
        pipeline.register_modules(
            transformer=tiny_transformer(qk_norm="rms_norm", dual_attention_layers=(0,)),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
    return pipeline


Saved = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a pipeline, and the pipeline itself, by its name in ``CALLS``."""

    @cache
    def save(name: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("layout")
        pipeline = made(name, folder / "words")
        pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # T5 drops out
        return folder / "pipeline", pipeline

    return save


@cache
def loaded(saved: Saved, name: str, size: tuple[int, int] = WIDE) -> Model:
    return load_model(str(saved(name)[0]), height=size[0], width=size[1])


@pytest.mark.parametrize("size", [(64, 64), WIDE])
@pytest.mark.parametrize("name", CALLS)
def test_a_layout_is_sampled_as_diffusers_does(name: str, size: tuple[int, int], saved: Saved) -> None:
    model, call = loaded(saved, name, size), CALLS[name]
    assert model.sampling.guidance_scale == (call["guidance_scale"] or 1.0)
    z = initial_noise(SAMPLES, model.latent_shape, SEED)
    latents, images = run_diffusers(saved(name)[1], z, [sample.generator(SEED, "solver") for sample in SAMPLES], call)
    ours = sample_latents(model, SAMPLES, PROMPTS, resolve_sampling(model, call["num_inference_steps"]), SEED)
    assert distance(ours, latents) < 1e-5
    drawn = model.decode(ours)
    assert drawn.shape == images.shape == (2, *size, 3)
    assert np.abs(drawn / 255 - images).max() <= 1 / 255
    assert np.abs(images[0] - images[1]).max() > 0.01  # two prompts, two images


# FLUX


def test_tokens_are_those_of_diffusers() -> None:
    from diffusers import FluxPipeline

    z = normal(2, 8, 6, 10)
    packed = FluxPipeline._pack_latents(z, *z.shape)
    assert torch.equal(to_tokens(z), packed)
    assert torch.equal(from_tokens(packed, 3, 5), z)
    places = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(token_places(3, 5), places)


def test_dev_reads_its_guidance_and_schnell_has_none(saved: Saved) -> None:
    dev, schnell = loaded(saved, "FLUX.1-dev"), loaded(saved, "FLUX.1-schnell")
    assert (dev.sampling.guidance_scale, schnell.sampling.guidance_scale) == (3.5, 1.0)
    assert (dev.guided(7.0).nfe, schnell.guided().nfe, schnell.guided(2.0).nfe) == (1, 1, 2)
    assert not dev.guidance_assumed and not schnell.guidance_assumed
    z, t, condition = normal(2, *dev.latent_shape), torch.tensor([900.0, 500.0]), dev.encode(PROMPTS)
    with torch.no_grad():
        weak, strong = (dev.guided(scale)(z, t, condition) for scale in (1.0, 7.0))
        both = dev.guided()(z, t, replace(condition, guidance=torch.tensor([1.0, 7.0])))
    assert distance(weak, strong) > 1e-4
    torch.testing.assert_close(both, torch.stack([weak[0], strong[1]]), rtol=1e-5, atol=1e-5)


def test_schnell_is_guided_by_a_second_evaluation(saved: Saved) -> None:
    model = loaded(saved, "FLUX.1-schnell", (32, 32))
    z, call = initial_noise(SAMPLES, model.latent_shape, SEED), CALLS["FLUX.1-schnell"]
    guided = {**call, "true_cfg_scale": 2.0, "negative_prompt": ["", ""]}
    latents, _ = run_diffusers(saved("FLUX.1-schnell")[1], z, [torch.Generator()] * 2, guided)
    ours = sample_latents(model, SAMPLES, PROMPTS, resolve_sampling(model, 2, guidance_scale=2.0), SEED)
    assert distance(ours, latents) < 1e-5


def test_times_depend_on_the_size(saved: Saved) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for name in ("FLUX.1-dev", "SD 3.5"):
        schedules = [loaded(saved, name, size).denoiser.schedule for size in ((64, 64), (64, 96), (96, 64))]
        assert all(isinstance(schedule, FlowSchedule) for schedule in schedules)
        shifts = [schedule.shift for schedule in schedules]  # type: ignore[attr-defined]
        assert shifts == pytest.approx([np.exp(calculate_shift(tokens)) for tokens in (16, 24, 24)])
    assert loaded(saved, "FLUX.1-schnell").denoiser.schedule.shift == 1.0  # type: ignore[attr-defined]


def test_a_model_without_a_size_of_its_own_draws_that_of_diffusers(saved: Saved) -> None:
    folder, _ = saved("FLUX.1-dev")
    model = load_model(str(folder))
    assert (model.image_size, model.latent_shape, model.asked_size) == ((1024, 1024), (8, 128, 128), False)
    (folder / "ddil.json").write_text(json.dumps({"solver": "flow_euler", "steps": 4, "height": 64, "width": 96}))
    student = load_model(str(folder))
    (folder / "ddil.json").unlink()
    assert (student.image_size, student.latent_shape, student.asked_size) == (WIDE, (8, 8, 12), False)
    assert student.sampling.distilled


# PixArt-Σ and SANA


def test_a_variance_that_the_network_predicts_too_is_dropped(saved: Saved) -> None:
    model = loaded(saved, "PixArt-Σ")
    z, t, condition = normal(2, *model.latent_shape), torch.tensor([999, 20]), model.encode(PROMPTS)
    with torch.no_grad():
        whole = model.denoiser.net(
            z, timestep=t, **condition.tensors, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ).sample
        assert whole.shape[1] == 2 * z.shape[1]
        assert torch.equal(model.denoiser.output(z, t, condition), whole[:, : z.shape[1]])
        shown = condition.tensors | {"encoder_attention_mask": torch.ones(2, 300)}  # the padding is masked
        assert distance(model.denoiser.output(z, t, type(condition)(shown)), whole[:, : z.shape[1]]) > 1e-4


def test_sana_reads_whole_times_and_its_instruction(saved: Saved) -> None:
    model = loaded(saved, "SANA")
    assert model.sampling.spacing == "flow_inner" and model.sampling.solver == "dpmpp_2m"
    z, condition = normal(2, *model.latent_shape), model.encode(PROMPTS)
    with torch.no_grad():
        outputs = [model.denoiser.output(z, torch.full((2,), t), condition) for t in (900.0, 900.9, 901.0)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    plain = model.pipeline.encode_prompt(PROMPTS, False, device="cpu")[0]  # without the instruction
    assert plain.shape == condition.tensors["encoder_hidden_states"].shape
    assert distance(condition.tensors["encoder_hidden_states"], plain) > 1e-3
    empty = model.pipeline.encode_prompt(PROMPTS[:1], True, device="cpu")[2]
    torch.testing.assert_close(model.nothing().tensors["encoder_hidden_states"], empty)


def test_an_autoencoder_of_one_latent_encodes_and_decodes(saved: Saved) -> None:
    model = loaded(saved, "SANA", (64, 128))
    vae, pixels = model.pipeline.vae, normal(2, 3, 64, 128).clamp(-1, 1)
    mean, std = model.encode_images(pixels)
    with torch.no_grad():
        torch.testing.assert_close(mean, vae.encode(pixels).latent * 0.41407)
        whole = vae.decode(mean / 0.41407).sample
    assert mean.shape == (2, *model.latent_shape) == (2, 8, 2, 4) and not std.any()
    levels = model.layout.images.to_images(whole).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(model.decode(mean) - levels).max() <= 1
    before = dict(vars(vae))
    with tiles(vae, 4), torch.no_grad():
        assert vae.use_tiling and vae.tile_latent_min_width == 4
        assert vae.decode(mean[:1]).sample.shape == (1, 3, 64, 128)
    assert {key: value for key, value in vars(vae).items() if key in before} == before


def test_prompts_are_cut_where_each_text_encoder_ends(saved: Saved) -> None:
    for name, limit in (("PixArt-Σ", 300), ("SANA", 299)):
        model = loaded(saved, name)
        beside = len(model.pipeline.tokenizer("red red").input_ids) - 2  # each further word is one token
        fits, longer = (" ".join(["red"] * (limit - beside + more)) for more in (0, 1))
        assert model.cut([fits, longer, "red"]) == 1
