"""Memory of the device: what a model needs by its files' headers, what is free, and how to do with little."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.weights import read_json
from ddil_core.support.errors import DdilError

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_DECODED = 64
"""Pictures that are decoded at once where memory allows it."""

_SPARE = 0.8
"""The share of the free memory that decoding may take; the rest is for what the libraries keep for themselves."""


_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Need:
    """Bytes on the device for drawing one picture, and for distilling without the activations: without a critic, with one, and with
    one and moments of 8 bits."""

    sampling: int
    training: int
    matching: int
    matching_8bit: int


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken: of a GPU, what the driver and torch's own pool have free; else of the machine."""
    import psutil
    import torch

    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def latent_size(config: Mapping[str, Any], reference: str) -> tuple[int, int]:
    """(height, width) of a model's latents by its network's ``sample_size``: one number for both, or a pair, as in diffusers.

    Raises:
        DdilError: it is neither.
    """
    told = config.get("sample_size")
    size = (told, told) if isinstance(told, int) else told
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DdilError(
            f"the network of the model {reference!r} has the sample_size {told!r} in its configuration, so that the size of its "
            "latents is not known; set it to a number, or to a list of height and width"
        )
    return size[0], size[1]


def decode_bytes(config: Mapping[str, Any], pixels: int, width: int) -> int:
    """Bytes that decoding one picture of ``pixels`` pixels takes at its peak, for numbers of ``width`` bytes.

    The peak is in the decoder's last block, at full resolution: four maps (input, normalised, activated, convolved) of as many
    channels as the block before it gives, ``block_out_channels[1]``: 4 · C₁ · H · W · width. For Stable Diffusion's decoder
    (C₁ = 256) in float32 that is 1 GiB at 512² and 4 GiB at 1024².
    """
    channels = list(config.get("block_out_channels", (128,)))
    return 4 * channels[min(1, len(channels) - 1)] * pixels * width


def decode_batch(vae: Any, latent_height: int, latent_width: int, device: torch.device) -> int:
    """How many pictures to decode at once: as many as fit the free memory, at most 64; 0 where not even one fits."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = latent_height * latent_width * scale**2
    fit = int(_SPARE * free_bytes(device)) // decode_bytes(vae.config, pixels, vae.dtype.itemsize)
    return min(fit, MOST_DECODED)


@contextmanager
def tiles(vae: Any, latent_side: int) -> Iterator[None]:
    """Inside, pictures are decoded in tiles of half their side, a quarter of the memory; afterwards whole again.

    It changes a picture where its tiles are blended, and is for a picture that could not be decoded otherwise. By itself the
    autoencoder has tiles of its own full size. A tile's side is a multiple of 4 latents, so that its overlap, a quarter, is whole.
    """
    names = ("tile_latent_min_size", "tile_sample_min_size", "use_tiling")
    before = {name: getattr(vae, name) for name in names}
    vae.tile_latent_min_size = 4 * -(-latent_side // 8)
    vae.tile_sample_min_size = vae.tile_latent_min_size * 2 ** (len(vae.config.block_out_channels) - 1)
    vae.enable_tiling()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def on_device(modules: Iterable[nn.Module | None], device: torch.device) -> Iterator[None]:
    """Inside, the modules are on the device; afterwards they wait in the machine's memory and leave the GPU's to others.

    Those that are there already, on a visit around this one, stay.
    """
    present = [module for module in modules if module is not None]
    guests = [m for m in present if any(p.device.type != device.type for p in m.parameters())]
    for module in guests:
        module.to(device)
    try:
        yield
    finally:
        for module in guests if device.type == "cuda" else ():
            module.to("cpu")


def estimate_memory(folder: Path, parameters: Mapping[str, int], width: int) -> Need:
    """What a pipeline needs, from its components' numbers of parameters and the configurations in ``folder``; nothing is loaded.

    With P parameters and ``width`` bytes a number:

    - sampling: the larger of width · (P_text + P_denoiser + P_decoder), while prompts are encoded, and
      width · (P_denoiser + P_decoder) + one picture's decoding (:func:`decode_bytes`), after the text encoders left;
    - training: width · P_denoiser for the frozen teacher, and for the student in float32 20 bytes a parameter: weights 4,
      gradients 4, Adam's two moments 8, their moving average 4. Activations come on top and grow with the batch;
    - matching (DMD2, without an average): width · P_denoiser, and for generator and critic 16 bytes a parameter each; 10 each with
      moments of 8 bits (``optimizer: 8bit``).
    """
    denoiser = sum(parameters.get(name, 0) for name in _DENOISERS)
    text = sum(number for name, number in parameters.items() if name.startswith("text_encoder"))
    rest = sum(parameters.values()) - text
    sampling = max(width * (text + rest), width * rest + _decoding(folder, width))
    return Need(sampling, (width + 20) * denoiser, (width + 2 * 16) * denoiser, (width + 2 * 10) * denoiser)


def _decoding(folder: Path, width: int) -> int:
    part = next((name for name in _DENOISERS if (folder / name).is_dir()), None)
    if part is None or not (folder / "vae").is_dir():
        return 0
    vae, denoiser = (read_json(folder / name / "config.json") for name in ("vae", part))
    scale = 2 ** (len(vae.get("block_out_channels", (128,) * 4)) - 1)
    return decode_bytes(vae, math.prod(latent_size(denoiser, str(folder))) * scale**2, width)
