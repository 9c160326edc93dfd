"""A data set's training pictures, encoded once: what distillation draws its data from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddil_core.data.base import DataSet
from ddil_core.models.memory import decode_batch, on_device
from ddil_core.models.model import Model
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_tensors
from ddil_core.support.finite import all_finite
from ddil_core.support.progress import progress, warn


@dataclass(frozen=True, eq=False)
class LatentPool:
    """Encoded training pictures: the posterior's ``mean`` and ``std`` float16 [N, C, H, W] in scaled latents, and what the network
    is told of their captions: every tensor of a condition, float16 [N, …], by name."""

    mean: Tensor
    std: Tensor
    condition: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x₀ float32 [B, C, H, W], drawn from the posterior, and rows int64 [B]. All of it on the CPU."""
        rows = torch.randint(len(self), (size,), generator=generator)
        noise = torch.randn((size, *self.mean.shape[1:]), generator=generator)
        return self.mean[rows].float() + self.std[rows].float() * noise, rows


_TOLD = "condition."

PART = 16
"""Batches that are kept in one file while a pool is being encoded: 1,024 pictures, at most which an interruption costs."""


def image_side(model: Model) -> int:
    """The side in pixels of the pictures that a model was made for.

    Raises:
        DdilError: they are no squares, to which pictures are prepared.
    """
    _, *size = model.latent_shape
    height, width = (side * 2 ** (len(model.pipeline.vae.config.block_out_channels) - 1) for side in size)
    if height != width:
        raise DdilError(
            f"the model {model.reference!r} draws pictures of {height} x {width} pixels (height x width), and pictures of a data "
            "set are prepared as squares; name a model of square pictures"
        )
    return height


@torch.no_grad()
def encode_pool(model: Model, data: DataSet, size: int, path: Path, batch_size: int = 64) -> LatentPool:
    """Encode the first ``size`` training pictures once and keep them at ``path``; read them back where that is done.

    Interrupted, it goes on after the parts that are done, which lie beside ``path`` until it is whole.

    Raises:
        DdilError: the file at ``path`` is damaged, or pictures are.
    """
    folder = path.with_suffix(".parts")
    if not path.is_file():
        write_tensors(path, _joined(_encode_parts(model, data, size, folder, batch_size), size))
    shutil.rmtree(folder, ignore_errors=True)
    return _read_pool(path)


def _encode_parts(model: Model, data: DataSet, size: int, folder: Path, batch_size: int) -> list[Path]:
    """Files of ``PART`` batches each, after those that are in the folder already."""
    folder.mkdir(parents=True, exist_ok=True)
    side = image_side(model)
    made = {"data": data.identity(), "of": f"{size} pictures of {side} px in batches of {batch_size}"}
    parts = _kept(folder, made)
    done, cut = min(len(parts) * PART * batch_size, size), 0
    with progress("encode the data", total=size, done=done) as advance, on_device(model.text_encoders(), model.device):
        batches = data.training(size, side, batch_size, first=len(parts) * PART)
        while part := list(islice((_encode(model, *batch, advance) for batch in batches), PART)):
            cut += sum(longer for _, longer in part)
            tensors = {name: torch.cat([encoded[name] for encoded, _ in part]) for name in part[0][0]}
            parts.append(folder / f"{len(parts):05d}.safetensors")
            write_tensors(parts[-1], tensors, made)
    if cut:
        warn(f"{cut} of {size - done} captions are longer than the text encoder takes; the rest of each is not read")
    return parts


def _encode(
    model: Model, images: np.ndarray, captions: list[str], advance: Callable[[int], None]
) -> tuple[dict[str, Tensor], int]:
    """A batch of the pool, and how many of its captions are cut."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    at_once = decode_batch(
        model.pipeline.vae, *model.latent_shape[1:], model.device
    )  # encoding takes less than decoding
    posterior = [model.encode_images(some) for some in pixels.split(max(at_once, 1))]
    told = model.encode(captions).tensors
    advance(len(images))
    tensors = {name: torch.cat(some) for name, some in zip(("mean", "std"), zip(*posterior, strict=True), strict=True)}
    tensors |= {_TOLD + name: tensor for name, tensor in told.items()}
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    if not all_finite(halves.values()):
        raise DdilError(
            f"what the model {model.reference!r} encodes pictures or captions to is too large for float16, in which it is kept "
            "(above 65,504); check its autoencoder's scaling_factor"
        )
    return {name: tensor.cpu().contiguous() for name, tensor in halves.items()}, model.cut(captions)


def _kept(folder: Path, made: dict[str, str]) -> list[Path]:
    """The parts that an interrupted run left, in their order; what was made of other data, or is damaged, is deleted."""
    kept = list[Path]()
    for path in sorted(folder.iterdir()):
        try:
            with safe_open(path, "pt") as part:
                fits = part.metadata() == made and path.name == f"{len(kept):05d}.safetensors"
        except SafetensorError:
            fits = False
        if fits:
            kept.append(path)
        else:
            path.unlink()
    return kept


def _joined(parts: list[Path], size: int) -> dict[str, Tensor]:
    """The tensors of all parts, one after another, in memory once."""
    joined, start = dict[str, Tensor](), 0
    for path in parts:
        part = load_file(path)
        for name, tensor in part.items():
            whole = joined.setdefault(name, tensor.new_empty((size, *tensor.shape[1:])))
            whole[start : start + len(tensor)] = tensor
        start += len(part["mean"])
    return joined


def _read_pool(path: Path) -> LatentPool:
    try:
        tensors = load_file(path)
        told = {name.removeprefix(_TOLD): tensors.pop(name) for name in list(tensors) if name.startswith(_TOLD)}
        pool = LatentPool(**tensors, condition=told)
    except (SafetensorError, TypeError, OSError) as error:
        raise DdilError(f"the encoded data {path} is damaged; delete the file to encode the data again") from error
    if not all_finite(part for tensor in (pool.mean, pool.std) for part in tensor.split(1024)):
        raise DdilError(
            f"the encoded data {path} hold values that are not finite; delete the file to encode them again"
        )
    return pool
