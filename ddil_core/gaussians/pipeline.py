"""The gaussians world as a pipeline of diffusers: a denoiser and a scheduler, without text encoder and autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from ddil_core.gaussians.world import class_index


class GaussiansPipeline(DiffusionPipeline):
    """A denoiser of points with its noise schedule."""

    def __init__(self, denoiser: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.vae = IdentityAutoencoder(denoiser.config.in_channels)

    def encode_classes(self, prompts: list[str]) -> Tensor:
        """Return one-hot rows [B, classes] of names of classes; zeros for the empty prompt.

        Raises:
            WrongCommand: a prompt is no class.
        """
        classes = self.denoiser.config.classes
        rows = torch.zeros(len(prompts), classes, device=self.denoiser.device)
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt:
                row[class_index(prompt, classes)] = 1.0
        return rows


class IdentityAutoencoder(nn.Module):
    """The autoencoder of a world whose latents are its images."""

    dtype = torch.float32

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = FrozenDict(
            latent_channels=channels, block_out_channels=(channels,), scaling_factor=1.0, force_upcast=False
        )
        self.decoder = nn.Identity()

    def encode(self, images: Tensor) -> Encoded:
        """Return the points as a distribution without a spread."""
        return Encoded(Posterior(images, torch.zeros_like(images)))

    def decode(self, latents: Tensor) -> Decoded:
        """Return the latents."""
        return Decoded(self.decoder(latents))


@dataclass(frozen=True)
class Posterior:
    """A distribution of latents [B, D, 1, 1]."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Encoded:
    """What ``encode`` returns, as diffusers' autoencoders do."""

    latent_dist: Posterior


@dataclass(frozen=True)
class Decoded:
    """What ``decode`` returns, as diffusers' autoencoders do."""

    sample: Tensor
