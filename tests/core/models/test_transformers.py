"""The layouts of today's transformers, on random weights, against diffusers' own pipelines from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import Model, load_model
from tests.core.closed_form import distance
from tests.pipelines import save_pipeline
from tests.reference import PROMPTS, run_diffusers
from tests.transformers import BUILDERS

SAMPLES = [Sample(prompt) for prompt in PROMPTS]
SEED = 3
SIZES = [(64, 64), (64, 96)]
CALLS: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"num_inference_steps": 4, "guidance_scale": 3.5},
    "PixArtSigmaPipeline": {"num_inference_steps": 8, "guidance_scale": 4.5},
    "SanaPipeline": {"num_inference_steps": 8, "guidance_scale": 4.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each layout."""
    return {name: save_pipeline(tmp_path_factory.mktemp(name), None, seed=1, layout=name) for name in BUILDERS}


def stock(folder: Path) -> Any:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(folder: Path, model: Model, call: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    z, (height, width) = initial_noise(SAMPLES, model.latent_shape, SEED), model.image_size
    generators = [sample.generator(SEED, "solver") for sample in SAMPLES]
    return run_diffusers(stock(folder), z, generators, {**call, "height": height, "width": width})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", BUILDERS)
def test_a_layout_is_sampled_as_diffusers_does(layout: str, size: tuple[int, int], folders: dict[str, Path]) -> None:
    model, call = load_model(str(folders[layout]), height=size[0], width=size[1]), CALLS[layout]
    assert model.sampling.guidance_scale == call["guidance_scale"]
    latents, images = theirs(folders[layout], model, call)
    ours = sample_latents(model, SAMPLES, PROMPTS, resolve_sampling(model, call["num_inference_steps"]), SEED)
    print(layout, size, distance(ours, latents), np.abs(model.decode(ours) / 255 - images).max())
    assert distance(ours, latents) < 1e-5
    drawn = model.decode(ours)
    assert drawn.shape == images.shape == (2, *size, 3)
    assert np.abs(drawn / 255 - images).max() <= 1 / 255
    assert np.abs(images[0] - images[1]).max() > 0.01  # two prompts, two images
