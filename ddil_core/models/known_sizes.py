"""The sizes of published models whose architecture is known, to estimate memory before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

from ddil_core.models.memory import Need, decode_bytes, need_memory
from ddil_core.models.system_specs import load_systems


@dataclass(frozen=True)
class Architecture:
    """An architecture of published models.

    Attributes:
        parameters: The number of parameters of each component.
        decoder: The channels of the autoencoder's blocks.
    """

    parameters: dict[str, int]
    decoder: tuple[int, ...] = (128, 256, 512, 512)


VAE = 83_653_863
CLIP_L = 123_060_480
"""CLIP ViT-L/14's text encoder."""

SD1 = Architecture({"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L})
SD2 = Architecture({"unet": 865_910_724, "vae": VAE, "text_encoder": 340_387_840})
SDXL = Architecture({"unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": 694_659_840})
LCM = Architecture(SD1.parameters | {"unet": SD1.parameters["unet"] + 256 * 320})
"""Stable Diffusion 1 with the projection of the guidance's embedding."""

ARCHITECTURES = {"sd15": SD1, "instaflow": SD1, "dmd": SD1, "lcm": LCM, "sd21": SD2, "add": SD2, "sdxl": SDXL}
"""The architectures of rows of ``systems.yaml``. A row with a ``base`` has that of its base."""


def known_need(name: str, width: int) -> Need | None:
    """Estimate the memory of a named system without its files; None where its architecture is not known here.

    Args:
        name: The name of a row of ``systems.yaml``.
        width: The bytes of a number.
    """
    systems = load_systems()
    if name not in systems:
        return None
    system = systems[name]
    architecture = ARCHITECTURES.get(system.base or name)
    if architecture is None or system.resolution is None:
        return None
    decoding = decode_bytes({"block_out_channels": architecture.decoder}, system.resolution**2, width)
    return need_memory(architecture.parameters, width, decoding)
