"""Check a model's autoencoder: its class, and the scaling between its latents and the denoiser's latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddil_core.support.devices import sent
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import broken_weight

ENCODERS = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderDC")
"""Autoencoders that encode an image as a distribution of latents, or as one latent (AutoencoderDC).

Training and prompt inversion need them.
"""
DECODERS = (*ENCODERS, "AutoencoderTiny")
"""Autoencoders that a model can be sampled with."""
IDENTITY = "IdentityAutoencoder"
"""The autoencoder of a world whose latents are its images. It is no component in a pipeline's files."""
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""The keys of an autoencoder's configuration that say how its latents are scaled."""
SMALLEST = 1e-6
"""The smallest scale of latents; the largest is its inverse. Autoencoders have 0.1 to 10.

A scale outside gives latents that are finite and all alike, and so a picture of nothing.
"""


def require_decoder(kind: str, reference: str) -> None:
    """Refuse an autoencoder of a class that cannot be used here.

    Raises:
        DdilError: the class ``kind`` is none of ``DECODERS``.
    """
    if kind not in DECODERS:
        raise DdilError(
            f"the model {reference!r} has an autoencoder of the class {kind}, which is not supported; "
            f"the class may be {' or '.join(DECODERS)}"
        )


def require_encoder(vae: Any, reference: str) -> None:
    """Refuse an autoencoder that cannot encode images.

    Raises:
        DdilError: the class of ``vae`` is none of ``ENCODERS``.
    """
    kind = type(vae).__name__
    if kind not in (*ENCODERS, IDENTITY):
        raise DdilError(
            f"the model {reference!r} has an autoencoder of the class {kind}, which gives no distribution of "
            f"latents, so it cannot encode images; put the model's own {ENCODERS[0]} in its place"
        )


def require_scaling(vae: Any, reference: str) -> None:
    """Refuse a scaling of the latents that is unusable, or so small or large that every image is one grey.

    Raises:
        DdilError: the configuration holds such a value.
    """
    scale, _ = latent_scaling(vae, reference)
    if not all(SMALLEST <= value <= 1 / SMALLEST for value in torch.as_tensor(scale).flatten().tolist()):
        raise DdilError(
            f"the autoencoder's configuration of the model {reference!r} has a scale of latents (scaling_factor / "
            f"latents_std) that is not from {SMALLEST:g} to {1 / SMALLEST:g}; fetch the model again"
        )


def require_finite_tiny(vae: Any, reference: str) -> None:
    """Refuse an AutoencoderTiny with weights that are not finite. Its ReLUs turn −∞ into 0, so its images stay finite.

    Raises:
        DdilError: a weight is NaN or infinite.
    """
    if type(vae).__name__ == "AutoencoderTiny" and (weight := broken_weight(vae)) is not None:
        raise DdilError(
            f"the autoencoder of the model {reference!r} holds weights that are not finite, first in {weight}; fetch "
            "the model again"
        )


def latent_scaling(
    vae: Any, reference: str, device: torch.device | str = "cpu"
) -> tuple[float | Tensor, float | Tensor]:
    """Return (scale, shift) of an autoencoder. The denoiser's latent is z = (latent − shift) · scale.

    With ``latents_mean`` and ``latents_std`` (one number a channel, as in diffusers' SDXL) the shift is the mean and
    the scale is ``scaling_factor`` / std, both float32 [C, 1, 1]. Without them the shift is ``shift_factor``, as in
    SD3, or 0.

    Raises:
        DdilError: the configuration holds an unusable value.
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
            f"{where} has latents_mean {mean} and latents_std {std}; both must hold a finite number for each of the "
            f"{channels} channels, std above 0, and shift_factor must not be set beside them: fetch the model again"
        )
    std, mean = (
        sent(torch.tensor(values, dtype=torch.float32), torch.device(device)).view(-1, 1, 1) for values in (std, mean)
    )
    return factor / std, mean


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(values: object, length: object) -> bool:
    return isinstance(values, Sequence) and len(values) == length and all(map(_is_number, values))
