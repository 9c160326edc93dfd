"""The pool: training images and captions that are encoded once. Distillation draws its batches from the pool."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddil_core.data.base import DataSet, Side, in_words
from ddil_core.models.memory import MOST_ENCODED, decode_batch, on_device
from ddil_core.models.model import Model
from ddil_core.support import ranks
from ddil_core.support.checksums import SUFFIX, Damaged, delete_with_checksum, require_checksum, with_checksum
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_tensors
from ddil_core.support.finite import all_finite
from ddil_core.support.progress import progress, warn


class Figures(NamedTuple):
    """What latents of the data are like, channel by channel [C].

    Attributes:
        mean: The mean.
        deviation: The standard deviation.
        mean_deviation: The standard deviation of the means of single images.
        apart: The mean distance between two images, a number.
    """

    mean: Tensor
    deviation: Tensor
    mean_deviation: Tensor
    apart: Tensor


@dataclass(frozen=True, eq=False)
class LatentPool:
    """Encoded training images and captions. All is float16, or float32 for points (``ImageFormat.stored``).

    Attributes:
        mean: The posterior's mean [N, C, H, W], in scaled latents.
        std: The posterior's standard deviation [N, C, H, W], in scaled latents.
        condition: The encoded captions: each tensor of the network's condition [N, …], by its name.
    """

    mean: Tensor
    std: Tensor
    condition: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw x₀, float32 [B, C, H, W], from the posteriors of random rows; return x₀ and the rows, int64 [B]."""
        rows = torch.randint(len(self), (size,), generator=generator)
        noise = torch.randn((size, *self.mean.shape[1:]), generator=generator)
        return self.mean[rows].float() + self.std[rows].float() * noise, rows

    @cached_property
    def figures(self) -> Figures:
        """The figures of the posteriors' means. They are computed once, because they read the whole pool."""
        data = self.mean.float()
        apart = (data[::2][: len(data) // 2] - data[1::2]).flatten(1).norm(dim=1).mean()
        return Figures(data.mean((0, 2, 3)), data.std((0, 2, 3)), data.mean((2, 3)).std(0), apart)


_CONDITION = "condition."
"""The prefix of the condition's tensors in a pool's file."""

AGAIN = "delete the file to encode the data again"

PART = 16
"""Batches in one part file. With 64 images a batch, an interruption loses at most 1,024 images."""


def image_side(model: Model) -> Side:
    """Return the side in pixels of the square images that a model draws, or (height, width) of other images."""
    height, width = model.image_size
    return height if height == width else (height, width)


@torch.no_grad()
def encode_pool(model: Model, data: DataSet, size: int, path: Path, batch_size: int = 64) -> LatentPool:
    """Encode the first ``size`` training images and store them, or read the file where it exists.

    The work is stored in parts, so that an interrupted call goes on where it stopped. The parts lie in a folder beside
    ``path`` until all images are encoded.

    Args:
        model: The model that encodes.
        data: The data set.
        size: The number of images.
        path: The pool's file.
        batch_size: The number of images that are read at once.

    Raises:
        DdilError: the file at ``path`` or an image is damaged, or encoded values are too large for float16.
    """
    folder = path.with_suffix(".parts")
    if not path.is_file():
        parts = _encode_parts(model, data, size, folder, batch_size)
        write_tensors(path, _joined(parts, size), writing=with_checksum)
    shutil.rmtree(folder, ignore_errors=True)
    return _read_pool(path)


def _encode_parts(model: Model, data: DataSet, size: int, folder: Path, batch_size: int) -> list[Path]:
    """Encode the parts that the folder lacks, of ``PART`` batches each, and return the files of all parts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    side = image_side(model)
    # "pictures" stays: parts of earlier versions carry these words.
    metadata = {"data": data.identity(), "of": f"{size} pictures of {in_words(side)} px in batches of {batch_size}"}
    parts = _valid_parts(folder, metadata)
    done, cut = min(len(parts) * PART * batch_size, size), 0
    with (
        model.compute.precision(),
        progress("encode the data", total=size, done=done) as advance,
        on_device(model.text_encoders(), model.device),
    ):
        batches = data.training(size, side, batch_size, first=len(parts) * PART)
        while part := list(islice((_encode(model, *batch, advance) for batch in batches), PART)):
            cut += sum(longer for _, longer in part)
            tensors = {name: torch.cat([encoded[name] for encoded, _ in part]) for name in part[0][0]}
            parts.append(folder / f"{len(parts):05d}.safetensors")
            write_tensors(parts[-1], tensors, metadata, writing=with_checksum)
    if cut:
        warn(f"{cut} of {size - done} captions are longer than the text encoder takes; the rest of each is not read")
    return parts


def _encode(
    model: Model, images: np.ndarray, captions: list[str], advance: Callable[[int], None]
) -> tuple[dict[str, Tensor], int]:
    """Encode a batch; return its tensors by their names in the file, and how many of its captions are cut."""
    pixels = model.values(images)
    # Encoding needs less memory than decoding.
    at_once = decode_batch(model.pipeline.vae, *model.latent_shape[1:], model.device, MOST_ENCODED)
    posteriors = [model.encode_images(part) for part in pixels.split(max(at_once, 1))]
    condition = model.encode(captions).tensors
    advance(len(images))
    mean, std = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
    tensors = {"mean": mean, "std": std} | {_CONDITION + name: tensor for name, tensor in condition.items()}
    stored = {name: tensor.to(model.layout.images.stored) for name, tensor in tensors.items()}
    if not all_finite(stored.values()):
        raise DdilError(
            f"the encoded images or captions of the model {model.reference!r} are too large for float16 "
            "(above 65,504); check its autoencoder's scaling_factor"
        )
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}, model.cut(captions)


def _valid_parts(folder: Path, metadata: dict[str, str]) -> list[Path]:
    """Return the parts that an interrupted call left, in order. Delete damaged parts and those of other data."""
    parts = list[Path]()
    for path in sorted(path for path in folder.iterdir() if path.suffix != SUFFIX):
        try:
            require_checksum(path, "the part", AGAIN)
            with safe_open(path, "pt") as part:
                fits = part.metadata() == metadata and path.name == f"{len(parts):05d}.safetensors"
        except (SafetensorError, Damaged):
            fits = False
        if fits:
            parts.append(path)
        else:
            delete_with_checksum(path)
    return parts


def _joined(parts: list[Path], size: int) -> dict[str, Tensor]:
    """Join the tensors of all parts. Memory holds all images once, and one part beside them."""
    joined, start = dict[str, Tensor](), 0
    for path in parts:
        part = load_file(path)
        for name, tensor in part.items():
            whole = joined.setdefault(name, tensor.new_empty((size, *tensor.shape[1:])))
            whole[start : start + len(tensor)] = tensor
        start += len(part["mean"])
    return joined


def _read_pool(path: Path) -> LatentPool:
    if ranks.is_main():  # the other processes read the same file
        require_checksum(path, "the file of the encoded data", AGAIN)
    try:
        tensors = load_file(path)
        names = [name for name in tensors if name.startswith(_CONDITION)]
        condition = {name.removeprefix(_CONDITION): tensors.pop(name) for name in names}
        pool = LatentPool(**tensors, condition=condition)
    except (SafetensorError, TypeError, OSError) as error:
        raise DdilError(f"the encoded data {path} is damaged; {AGAIN}") from error
    if not all_finite(part for tensor in (pool.mean, pool.std) for part in tensor.split(1024)):
        raise DdilError(f"the encoded data {path} has values that are not finite; {AGAIN}")
    return pool
