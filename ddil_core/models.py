"""Models: what a reference names, loaded with its denoiser, text encoder and decoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_core.denoiser import Condition, GuidedDenoiser, UNetDenoiser
from ddil_core.errors import DdilError
from ddil_core.parameterization import Reflection
from ddil_core.protocol import read_yaml
from ddil_core.references import resolve
from ddil_core.schedule import Schedule

SYSTEM_FILE = "ddil.json"
"""Beside ``model_index.json``: how a pipeline is meant to be sampled. diffusers ignores it."""


@dataclass(frozen=True)
class Sampling:
    """How a model is meant to be sampled. ``steps`` is None where any number may be asked for."""

    solver: str = "ddim"
    steps: int | None = None
    guidance_scale: float = 1.0


@dataclass(eq=False)
class Model:
    """A text-to-image model in its parts: tokenizer and text encoder, denoiser, decoder."""

    reference: str
    folder: Path
    pipeline: Any
    denoiser: UNetDenoiser
    sampling: Sampling
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the model's own resolution."""
        config = self.pipeline.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def guided(self, guidance_scale: float | None = None, reflection: Reflection | None = None) -> GuidedDenoiser:
        """The denoiser with guidance (the model's own scale where None is given) and reflection."""
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        unconditional = None if scale == 1.0 else self.encode([""])
        return GuidedDenoiser(self.denoiser, unconditional, scale, reflection)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> Condition:
        """Text embeddings [B, L, D] of prompts, each distinct prompt encoded once."""
        distinct = list(dict.fromkeys(prompts))
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        parts = []
        for start in range(0, len(distinct), batch_size):
            tokens = tokenizer(
                distinct[start : start + batch_size],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            parts.append(encoder(tokens.input_ids.to(self.device)).last_hidden_state)
        place = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        return Condition({"encoder_hidden_states": torch.cat(parts)}).rows(rows)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's posterior (mean, std) in scaled latents, for pixels float32 [B, 3, H, W] in [-1, 1]."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return posterior.mean.float() * vae.config.scaling_factor, posterior.std.float() * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor, batch_size: int = 64) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3] of scaled latents [B, C, h, w]."""
        vae = self.pipeline.vae
        images = []
        for part in z.split(batch_size):
            pixels = vae.decode(part.to(vae.dtype) / vae.config.scaling_factor).sample
            images.append((pixels.float() * 127.5 + 127.5).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).cpu())
        return torch.cat(images).numpy()

    def weights_sha256(self) -> str:
        """A hash of all weights, file by file in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*.safetensors")):
            digest.update(str(path.relative_to(self.folder)).encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def load_model(reference: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """A model by reference, in evaluation mode.

    Raises:
        WrongCommand: the reference fits nothing; the message names the nearest that would.
        DdilError: its files are damaged or of a layout that is not known.
    """
    folder = resolve(reference)
    pipeline = _load_pipeline(folder, reference, dtype)
    device = torch.device(device)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.to(device).eval().requires_grad_(False)
    config = pipeline.scheduler.config
    denoiser = UNetDenoiser(pipeline.unet, Schedule.from_config(config).to(device), config.prediction_type)
    return Model(reference, folder, pipeline, denoiser, _sampling(folder), device)


def _load_pipeline(folder: Path, reference: str, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionPipeline

    layout = _read_json(folder / "model_index.json").get("_class_name")
    if layout != "StableDiffusionPipeline":
        raise DdilError(
            f"the model {reference!r} has the layout {layout}; StableDiffusionPipeline is the one known here"
        )
    try:
        return StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # every library below raises its own kind for a damaged file
        raise DdilError(
            f"the model {reference!r} cannot be loaded from {folder}: {' '.join(str(error).split())[:200]}; "
            "its files are damaged or incomplete, so fetch or make it again"
        ) from error


def _sampling(folder: Path) -> Sampling:
    path = folder / SYSTEM_FILE
    if not path.is_file():
        return Sampling(guidance_scale=7.5)
    told = _read_json(path)
    return Sampling(**{field.name: told[field.name] for field in fields(Sampling) if field.name in told})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DdilError(f"the file {path} of the model is damaged; fetch or make the model again") from error


def run_configuration(folder: Path) -> dict[str, Any] | None:
    """``run.yaml`` of a run folder; None where the folder is no run."""
    path = folder / "run.yaml"
    return read_yaml(path) if path.is_file() else None
