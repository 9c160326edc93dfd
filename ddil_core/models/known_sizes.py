"""The sizes of published models whose architecture is known, to estimate memory before anything is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ddil_core.models.image_size import Geometry
from ddil_core.models.memory import Need, decode_bytes, need_memory
from ddil_core.models.system_specs import load_systems


@dataclass(frozen=True)
class Architecture:
    """An architecture of published models.

    Attributes:
        parameters: The number of parameters of each component.
        unet: The configuration of the U-Net, as far as diffusers' defaults differ.
        decoder: The channels of the autoencoder's blocks.
    """

    parameters: dict[str, int]
    unet: dict[str, Any]
    decoder: tuple[int, ...] = (128, 256, 512, 512)


VAE = 83_653_863
CLIP_L = 123_060_480
"""CLIP ViT-L/14's text encoder."""

SD1 = Architecture(
    {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    {"cross_attention_dim": 768, "attention_head_dim": 8},
)
SD2 = Architecture(
    {"unet": 865_910_724, "vae": VAE, "text_encoder": 340_387_840},
    {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
)
SDXL = Architecture(
    {"unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": 694_659_840},
    {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
LCM = Architecture(
    SD1.parameters | {"unet": SD1.parameters["unet"] + 256 * 320}, SD1.unet | {"time_cond_proj_dim": 256}
)
"""Stable Diffusion 1 with the projection of the guidance's embedding."""

ARCHITECTURES = {"sd15": SD1, "instaflow": SD1, "dmd": SD1, "lcm": LCM, "sd21": SD2, "add": SD2, "sdxl": SDXL}
"""The architectures of rows of ``systems.yaml``. A row with a ``base`` has that of its base."""


PIXELS = 8
"""The pixels of a side that one latent of Stable Diffusion stands for."""


def known_geometry(name: str) -> Geometry | None:
    """Return the size of the images of a named system; None where its architecture or size is not known here."""
    resolution = load_systems()[name].resolution if architecture_of(name) is not None else None
    return None if resolution is None else Geometry((resolution, resolution), PIXELS)


def known_need(name: str, itemsize: int, height: int | None = None, width: int | None = None) -> Need | None:
    """Estimate the memory of a named system without its files; None where its architecture is not known here.

    Args:
        name: The name of a row of ``systems.yaml``.
        itemsize: The bytes of a number.
        height: The height of the images in pixels. None: the system's own.
        width: The width of the images in pixels. None: the system's own.

    Raises:
        WrongCommand: the system cannot draw images of this size.
    """
    architecture, geometry = architecture_of(name), known_geometry(name)
    if architecture is None or geometry is None:
        return None
    pixels = math.prod(geometry.size(height, width, name))
    decoding = decode_bytes({"block_out_channels": architecture.decoder}, pixels, itemsize)
    return need_memory(architecture.parameters, itemsize, decoding)


def architecture_of(name: str) -> Architecture | None:
    """Return the architecture of a row of ``systems.yaml``, or of its base; None where it is not known here."""
    systems = load_systems()
    return ARCHITECTURES.get(systems[name].base or name) if name in systems else None
