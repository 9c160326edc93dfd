"""Tiny real pipelines in Stable Diffusion's layout: the shapes world's sizes with few channels, untrained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

TEACHER = {"solver": "ddim", "steps": None, "guidance_scale": 3.0}
STUDENT = {"solver": "ddim", "steps": 4, "guidance_scale": 1.0}


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    from ddil_core.shapes.architecture import MAX_TOKENS

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tiny_autoencoder() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    from ddil_core.shapes.architecture import LATENT_CHANNELS

    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    )


def tiny_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    from ddil_core.shapes.architecture import LATENT_CHANNELS, LATENT_SIZE

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def save_pipeline(folder: Path, sampling: Mapping[str, object], *, seed: int, frame_seed: int = 0) -> Path:
    """A v-predicting pipeline for 64-pixel pictures and latents [8, 8, 8], float32, with ``ddil.json`` beside it.

    ``seed`` decides the U-Net, ``frame_seed`` the text encoder and the autoencoder, which distillation leaves alone.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from ddil_core.models import SYSTEM_FILE
    from ddil_core.shapes.architecture import write_tokenizer

    tokenizer = write_tokenizer(folder / "words")
    torch.manual_seed(frame_seed)
    text_encoder, vae = tiny_text_encoder(tokenizer), tiny_autoencoder()
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    (folder / "pipeline" / SYSTEM_FILE).write_text(json.dumps(dict(sampling)))
    return folder / "pipeline"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided teacher that takes any number of steps."""
    return save_pipeline(tmp_path_factory.mktemp("teacher"), TEACHER, seed=1)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of four steps without guidance: another U-Net in the teacher's frame."""
    return save_pipeline(tmp_path_factory.mktemp("student"), STUDENT, seed=2)


def plain_step(pipeline: Any, z: Tensor, prompt: str, t: int, s: int | None, guidance_scale: float) -> Tensor:
    """One guided DDIM step t → s (None: clean) of a v-predicting pipeline, z [1, C, H, W], written out by itself.

    Guidance is taken in ε, and nothing of this project is used.
    """
    import torch

    squares = pipeline.scheduler.alphas_cumprod.double()
    alpha, sigma = squares[t].sqrt().item(), (1 - squares[t]).sqrt().item()
    alpha_s, sigma_s = (1.0, 0.0) if s is None else (squares[s].sqrt().item(), (1 - squares[s]).sqrt().item())
    ids = pipeline.tokenizer([prompt, ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(ids).last_hidden_state
        v = pipeline.unet(torch.cat([z, z]), t, text).sample
    something, nothing = (sigma * z + alpha * v).chunk(2)
    eps = nothing + guidance_scale * (something - nothing)
    return alpha_s * (z - sigma * eps) / alpha + sigma_s * eps


def plain_picture(pipeline: Any, z: Tensor) -> Tensor:
    """float64 [1, 3, H, W] in [0, 1] of scaled latents, not rounded."""
    import torch

    with torch.no_grad():
        pixels = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    return ((pixels.double() + 1) / 2).clamp(0, 1)
