"""Memory of the device: what a model needs (by the headers of its files), what is free, and how to use less."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ddil_core.models.weights import AGAIN, read_json
from ddil_core.support.errors import DdilError
from ddil_core.support.misfits import value_text

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_DECODED = 32
"""The most images that are decoded at once.

From 64 on, diffusers' Upsample2D copies every map into the layout that convolutions of a CPU are slow in.
"""
MOST_ENCODED = 64
"""The most images that are encoded at once."""

_moving = threading.Lock()
_users: Counter[nn.Module] = Counter()
"""How many contexts of ``on_device`` use a module."""
_moved: WeakSet[nn.Module] = WeakSet()
"""The modules that are on a device because of ``on_device``."""

_SPARE = 0.8
"""The share of the free memory that decoding may take. Libraries keep some of the rest for themselves."""

LARGEST_SIDE = 65_536
"""The largest side of latents, and the most channels of a block."""
MOST_BLOCKS = 16
"""The most blocks of an autoencoder. Each of them doubles the side of an image."""

DENOISERS = ("unet", "transformer", "denoiser")
"""The names that the denoising network has in pipelines."""


@dataclass(frozen=True)
class Need:
    """Bytes on the device. The numbers for distilling leave out the activations.

    Attributes:
        sampling: To sample one image.
        training: To distil without a critic.
        matching: To distil with a critic (DMD2).
        matching_8bit: To distil with a critic, with an optimiser that keeps its moments in 8 bits.
    """

    sampling: int
    training: int
    matching: int
    matching_8bit: int


def free_bytes(device: torch.device) -> int:
    """Return the free bytes: for a GPU those of the driver and of torch's pool, or else those of the machine."""
    import psutil
    import torch

    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


PACKED, PACKED_SIZE = 2, 128
"""The side of FLUX's patches, and the side of the latents that its pipeline draws: its network names no size."""


def packed(config: Mapping[str, Any]) -> int:
    """Return the side of the patches that a network gets as the channels of one token: ``PACKED`` for FLUX, or 1."""
    return PACKED if "axes_dims_rope" in config else 1


def latent_channels(config: Mapping[str, Any]) -> int:
    """Return the number of channels of a network's latents."""
    return int(config["in_channels"]) // packed(config) ** 2


def latent_size(config: Mapping[str, Any], reference: str) -> tuple[int, int]:
    """Return (height, width) of a model's latents: the ``sample_size`` of its network, one number or a pair.

    FLUX's network names none, and its latents have the size of diffusers' pipeline.

    Raises:
        DdilError: ``sample_size`` is neither.
    """
    sample_size = config.get("sample_size", None if packed(config) == 1 else PACKED_SIZE)
    size = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(_is_count(side, LARGEST_SIDE) for side in size)):
        raise DdilError(
            f"the network of the model {reference!r} has the sample_size {value_text(sample_size)} in its "
            "configuration, so the size of its latents is not known; set sample_size to a number, or to a list of "
            "height and width"
        )
    return size[0], size[1]


def block_channels(config: Mapping[str, Any], reference: str) -> list[int]:
    """Return the channels of the blocks of an autoencoder's decoder, from its configuration.

    They are ``block_out_channels``, or ``decoder_block_out_channels`` of an AutoencoderDC.

    Raises:
        DdilError: it is no list of 1 to ``MOST_BLOCKS`` whole numbers above 0.
    """
    key = "decoder_block_out_channels" if "decoder_block_out_channels" in config else "block_out_channels"
    channels = config.get(key, (128,) * 4)
    fits = isinstance(channels, list | tuple) and 1 <= len(channels) <= MOST_BLOCKS
    if not fits or not all(_is_count(number, LARGEST_SIDE) for number in channels):
        raise DdilError(
            f"the autoencoder of the model {reference!r} has the {key} {value_text(channels)} in its "
            f"configuration; {AGAIN}"
        )
    return list(channels)


def latent_scale(config: Mapping[str, Any], reference: str) -> int:
    """Return how many pixels a side of a latent stands for. Every block of an autoencoder but one doubles the side.

    Raises:
        DdilError: see :func:`block_channels`.
    """
    return int(2 ** (len(block_channels(config, reference)) - 1))


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def decode_bytes(config: Mapping[str, Any], pixels: int, width: int) -> int:
    """Return the peak bytes to decode one image of ``pixels`` pixels with numbers of ``width`` bytes.

    The peak is in the decoder's last block, at full resolution. It holds four maps (input, normalised, activated,
    convolved) with the C₁ channels of the block before (:func:`block_channels`): 4 · C₁ · H · W · width bytes.
    Stable Diffusion's decoder (C₁ = 256) needs 1 GiB at 512² and 4 GiB at 1024² in float32.
    """
    channels = list(config.get("decoder_block_out_channels", config.get("block_out_channels", (128,))))
    return 4 * channels[min(1, len(channels) - 1)] * pixels * width


def decode_batch(
    vae: Any, latent_height: int, latent_width: int, device: torch.device, most: int = MOST_DECODED
) -> int:
    """Return how many images fit the free memory when they are decoded at once: 0 to ``most``."""
    scale = latent_scale(vae.config, "")
    pixels = latent_height * latent_width * scale**2
    fit = int(_SPARE * free_bytes(device)) // decode_bytes(vae.config, pixels, vae.dtype.itemsize)
    return min(fit, most)


@contextmanager
def tiles(vae: Any, latent_side: int) -> Iterator[None]:
    """Decode in tiles inside the context. A tile has half the side of the image and needs a quarter of the memory.

    Tiles change an image where they are blended, so this is only for images that do not fit otherwise. The
    autoencoder's default tile is as large as its training images. A tile's side is a multiple of 4 latents, so its
    overlap, a quarter, is whole. An autoencoder without tiles decodes whole images.
    """
    if not hasattr(vae, "use_tiling"):  # diffusers' AsymmetricAutoencoderKL has no tiles
        yield
        return
    side = 4 * -(-latent_side // 8)
    pixels = side * latent_scale(vae.config, "")
    if hasattr(vae, "tile_sample_stride_height"):  # AutoencoderDC
        settings = dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), pixels)
        settings |= dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), pixels * 3 // 4)
        settings |= dict.fromkeys(("tile_latent_min_height", "tile_latent_min_width"), side)
    else:
        settings = {"tile_latent_min_size": side, "tile_sample_min_size": pixels}
    settings |= {"use_tiling": True}
    before = {name: getattr(vae, name) for name in settings}
    for name, value in settings.items():
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def on_device(modules: Iterable[nn.Module | None], device: torch.device, *, stay: bool = False) -> Iterator[None]:
    """Move modules to the device inside the context, and off the GPU afterwards unless they may ``stay``.

    Contexts may be nested, and threads may use a module at the same time: the last one to leave moves it off.

    Args:
        modules: The modules. None stands for one that is missing.
        device: The device.
        stay: Leave them there while they take at most a quarter of the memory that is free beside them, until a context
            without it has used them. Moving them takes longer than they work.
    """
    used: list[nn.Module] = []
    try:
        for module in modules:
            if module is not None:
                _take(module, device)
                used.append(module)
        yield
    finally:
        stay = stay and device.type == "cuda" and 4 * sum(map(_bytes, used)) <= free_bytes(device)
        for module in used:
            _leave(module, device, stay)


def _take(module: nn.Module, device: torch.device) -> None:
    with _moving:
        if not _users[module] and any(p.device.type != device.type for p in module.parameters()):
            module.to(device)
            _moved.add(module)
        _users[module] += 1


def _leave(module: nn.Module, device: torch.device, stay: bool) -> None:
    with _moving:
        _users[module] -= 1
        if _users[module]:
            return
        del _users[module]  # so that the module can be freed
        if module in _moved and not stay:
            _moved.remove(module)
            if device.type == "cuda":
                module.to("cpu")


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def estimate_memory(
    folder: Path, parameters: Mapping[str, int], width: int, size: tuple[int, int] | None = None
) -> Need:
    """Estimate the memory that a pipeline needs from its numbers of parameters and the configurations in ``folder``.

    ``size`` is the size (H, W) of its images in pixels; None takes the model's own.
    """
    return need_memory(parameters, width, _decoding(folder, width, size))


def need_memory(parameters: Mapping[str, int], width: int, decoding: int) -> Need:
    """Estimate the memory that a pipeline needs from its numbers of parameters and the ``decoding`` of an image.

    With P parameters and ``width`` bytes a number:

    - sampling: the larger of width · (P_text + P_denoiser + P_decoder), while prompts are encoded, and
      width · (P_denoiser + P_decoder) + the decoding of one image (:func:`decode_bytes`), after the text encoders have
      left (they stay where there is room for both);
    - training: width · P_denoiser for the frozen teacher, and 20 bytes a parameter for the student in float32: weights
      4, gradients 4, Adam's two moments 8, moving average 4. Activations come on top and grow with the batch;
    - matching (DMD2, without an average): width · P_denoiser, and 16 bytes a parameter for the generator and for the
      critic, or 10 with moments of 8 bits (``optimizer: 8bit``).
    """
    denoiser = sum(parameters.get(name, 0) for name in DENOISERS)
    text = sum(number for name, number in parameters.items() if name.startswith("text_encoder"))
    rest = sum(parameters.values()) - text
    sampling = max(width * (text + rest), width * rest + decoding)
    return Need(sampling, (width + 20) * denoiser, (width + 2 * 16) * denoiser, (width + 2 * 10) * denoiser)


def _decoding(folder: Path, width: int, size: tuple[int, int] | None) -> int:
    part = next((name for name in DENOISERS if (folder / name).is_dir()), None)
    if part is None or not (folder / "vae").is_dir():
        return 0
    vae, denoiser = (read_json(folder / name / "config.json") for name in ("vae", part))
    scale = latent_scale(vae, str(folder))
    own = math.prod(latent_size(denoiser, str(folder))) * scale**2
    return decode_bytes(vae, own if size is None else math.prod(size), width)
