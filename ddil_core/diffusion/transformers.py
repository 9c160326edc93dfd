"""The transformers of FLUX, PixArt-Σ and SANA as denoisers, and FLUX's tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddil_core.diffusion.denoiser import NetworkDenoiser

PATCH = 2
"""The side of FLUX's patches, in latents."""


class FluxDenoiser(NetworkDenoiser):
    """``FluxTransformer2DModel``. It reads the latents of 2 × 2 places as the channels of one token.

    Inputs: ``encoder_hidden_states`` [B, L, D] and ``pooled_projections`` [B, D']; FLUX.1-dev also ``guidance`` [B],
    the guidance scale. Its times are in [0, 1].
    """

    guided_outside = False

    @property
    def reads_guidance(self) -> bool:
        return bool(self.config["guidance_embeds"])

    def guidance_inputs(self, scale: float | Tensor) -> dict[str, Tensor]:
        return {"guidance": torch.as_tensor(scale, dtype=torch.float32).reshape(-1)}

    def call(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        rows, columns = z.shape[-2] // PATCH, z.shape[-1] // PATCH
        tokens = self.net(
            hidden_states=to_tokens(z),
            timestep=t.to(z.dtype) / len(self.schedule),
            txt_ids=z.new_zeros(inputs["encoder_hidden_states"].shape[1], 3),
            img_ids=token_places(rows, columns, z.device).to(z.dtype),
            **inputs,
        ).sample
        return from_tokens(tokens, rows, columns)


class CaptionedDenoiser(NetworkDenoiser):
    """``PixArtTransformer2DModel`` and ``SanaTransformer2DModel``. A variance that it also predicts is dropped.

    Inputs: ``encoder_hidden_states`` [B, L, D] and ``encoder_attention_mask`` [B, L], 0 where there is no word.
    """

    def call(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        more: dict[str, Any] = {}
        if "use_additional_conditions" in self.config:  # of PixArt-α; its successor has no sizes to read
            more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        timestep = t * self.config.get("timestep_scale", 1.0)
        output: Tensor = self.net(z, timestep=timestep, **inputs, **more).sample
        return output[:, : z.shape[1]]


def to_tokens(z: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as FLUX's tokens [B, (H/2)(W/2), 4C], row by row.

    A token holds the 2 × 2 places of a channel, then those of the next channel, as in diffusers.
    """
    return F.pixel_unshuffle(z, PATCH).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Return the latents [B, C, H, W] of FLUX's tokens, which lie in ``rows`` and ``columns``."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)


def token_places(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Return where FLUX's tokens are: (0, row, column), float32 [rows · columns, 3]."""
    places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    return F.pad(places.float(), (1, 0))
