"""Models with the layouts of Stable Diffusion and SDXL and random weights, for speed and rounding: nothing is downloaded.

They have no text encoder. Each prompt has a condition of random numbers, the same for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from ddil_core.diffusion.schedule import Schedule
from ddil_core.models.compiling import prepare_networks
from ddil_core.models.known_sizes import ARCHITECTURES
from ddil_core.models.layouts import LAYOUTS
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.models.system_specs import Files
from ddil_core.support.compute import FP32, Compute

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        unet: The configuration of the U-Net.
        vae: The configuration of the autoencoder.
        conditions: The shape of each tensor of the condition, without the batch.
        pipeline: The name of diffusers' pipeline class.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    conditions: dict[str, tuple[int, ...]]
    pipeline: str = "StableDiffusionPipeline"


def _vae(channels: Sequence[int], layers: int, sample_size: int) -> dict[str, Any]:
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "latent_channels": 4,
        "sample_size": sample_size,
    }


SHAPES: dict[str, Shape] = {
    "small SD": Shape(
        {
            "sample_size": 32,
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": 8,
        },
        _vae((32, 64), 1, 64),
        {"encoder_hidden_states": (77, 64)},
    ),
    "SD 1.5": Shape(
        {"sample_size": 64, **ARCHITECTURES["sd15"].unet},
        _vae((128, 256, 512, 512), 2, 512),
        {"encoder_hidden_states": (77, 768)},
    ),
    "SDXL": Shape(
        {"sample_size": 128, **ARCHITECTURES["sdxl"].unet},
        _vae((128, 256, 512, 512), 2, 1024),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        "StableDiffusionXLPipeline",
    ),
}
"""The sizes of the published models, and one for a CPU."""


def conditions(shape: Shape, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the condition of each prompt, float32 [B, …] on the CPU. ``time_ids`` are the size of the image."""
    found: dict[str, list[Tensor]] = {name: [] for name in shape.conditions}
    side = float(shape.vae["sample_size"])
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
        for name, size in shape.conditions.items():
            drawn = torch.randn(size, generator=generator)
            found[name].append(torch.tensor([side, side, 0, 0, side, side]) if name == "time_ids" else drawn)
    return {name: torch.stack(rows) for name, rows in found.items()}


def random_networks(shape: Shape) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Return the U-Net and the autoencoder, float32 on the CPU, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets: tuple[nn.Module, nn.Module] = UNet2DConditionModel(**shape.unet), AutoencoderKL(**shape.vae)
    for net in nets:
        net.eval().requires_grad_(False)
    return nets  # type: ignore[return-value]


def random_pipeline(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """Return diffusers' pipeline of random weights, without text encoders."""
    unet, vae = (net.to(device, dtype) for net in random_networks(shape))
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": DDIMScheduler(**SCHEDULER)}
    absent: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if shape.pipeline == "StableDiffusionXLPipeline":
        absent |= {"text_encoder_2": None, "tokenizer_2": None}
        pipeline: Any = StableDiffusionXLPipeline(**parts, **absent, add_watermarker=False)
    else:
        absent |= {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_model(name: str, device: str, compute: Compute = FP32) -> Model:
    """Return a model of this project with the weights of ``random_pipeline``."""
    shape = SHAPES[name]
    pipeline = random_pipeline(shape, device, compute.torch_dtype)

    def encode(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        return {key: rows.to(device) for key, rows in conditions(shape, prompts).items()}

    layout = replace(LAYOUTS[shape.pipeline], encode=encode, unconditional=None)
    config = dict(pipeline.scheduler.config) | {"_class_name": "DDIMScheduler"}
    denoiser = layout.denoiser(pipeline.unet, Schedule.from_config(config).to(device), "epsilon")
    prepare_networks(denoiser, pipeline.vae, torch.device(device), compute)
    sampling = Sampling.from_scheduler(config, 1.0)
    files, own = Files(Path(name)), torch.device(device)
    return Model(name, files, pipeline, layout, denoiser, sampling, own, compute=compute)
