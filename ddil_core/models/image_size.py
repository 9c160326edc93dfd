"""The size of the images that a model draws, by its configurations. No network is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddil_core.models.memory import DENOISERS, latent_size
from ddil_core.models.references import resolve
from ddil_core.models.weights import components, read_index, read_json


def image_size(reference: str) -> tuple[int, int]:
    """Return the size (H, W) in pixels of the images that a model draws.

    Args:
        reference: The reference of a model whose files are here.

    Raises:
        DdilError: a configuration is missing or damaged, or does not say the size.
    """
    folder = resolve(reference).folder
    parts = components(read_index(folder))
    network = next((name for name in DENOISERS if name in parts), DENOISERS[0])
    latent = latent_size(read_json(folder / network / "config.json"), reference)
    return decoded_size(latent, read_json(folder / "vae" / "config.json")) if "vae" in parts else latent


def decoded_size(latent: tuple[int, int], autoencoder: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size (H, W) in pixels of decoded latents of the size (h, w).

    Args:
        latent: The size of the latents.
        autoencoder: The configuration of the autoencoder.
    """
    scale = 2 ** (len(autoencoder.get("block_out_channels", (128,) * 4)) - 1)
    return latent[0] * scale, latent[1] * scale
