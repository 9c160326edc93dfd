"""What is asked of a model's autoencoder: a class that is known here, and a scaling between its latents and the network's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddil_core.support.errors import DdilError

ENCODERS = ("AutoencoderKL", "AsymmetricAutoencoderKL")
"""Autoencoders of diffusers that give a picture a distribution of latents, which training and prompt inversion need."""
DECODERS = (*ENCODERS, "AutoencoderTiny")
"""Those that a model can be sampled with."""
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""The keys of its configuration that say how its latents are scaled."""


def require_decoder(kind: str, reference: str) -> None:
    """Raises DdilError: a model's autoencoder is of a class that cannot be used here."""
    if kind not in DECODERS:
        raise DdilError(
            f"the model {reference!r} has an autoencoder of the class {kind}, which is not known here; "
            f"it may be {' or '.join(DECODERS)}"
        )


def require_encoder(vae: Any, reference: str) -> None:
    """Raises DdilError: pictures cannot be encoded with a model's autoencoder."""
    kind = type(vae).__name__
    if kind not in ENCODERS:
        raise DdilError(
            f"the model {reference!r} has an autoencoder of the class {kind}, which gives no distribution of latents, so that "
            f"pictures cannot be encoded with it; put the model's own {ENCODERS[0]} in its place"
        )


def latent_scaling(
    vae: Any, reference: str, device: torch.device | str = "cpu"
) -> tuple[float | Tensor, float | Tensor]:
    """(scale, shift) of an autoencoder: the network's latent is (latent − shift) · scale, and back latent = z / scale + shift.

    With ``latents_mean`` and ``latents_std``, a number for each channel, the shift is the mean and the scale
    ``scaling_factor`` / std, as in diffusers' SDXL; both are float32 [C, 1, 1] then. Else the shift is ``shift_factor``, SD3's.

    Raises:
        DdilError: the configuration holds a value that cannot be used.
    """
    config = vae.config
    factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    where = f"the autoencoder's configuration of the model {reference!r}"
    if not _is_number(factor) or factor <= 0 or not _is_number(shift):
        raise DdilError(f"{where} has the scaling_factor {factor} and the shift_factor {shift}; fetch the model again")
    if mean is None and std is None:
        return factor, shift
    channels = config.get("latent_channels")
    if not _is_list(mean, channels) or not _is_list(std, channels) or min(std) <= 0 or shift:
        raise DdilError(
            f"{where} has latents_mean {mean} and latents_std {std}; both have a finite number for each of its {channels} "
            "channels, std above 0, and shift_factor is not set beside them: fetch the model again"
        )
    tensors = (torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (std, mean))
    deviation, centre = tensors
    return factor / deviation, centre


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(values: Any, length: Any) -> bool:
    return isinstance(values, Sequence) and len(values) == length and all(map(_is_number, values))
