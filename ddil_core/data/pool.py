"""The pool: training images and captions that are encoded once. Distillation draws its batches from the pool."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
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

from ddil_core.data.base import DataSet
from ddil_core.models.image_size import decoded_size
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

    def rows(self, size: int, generator: torch.Generator, batch: int = 0) -> Tensor:
        """Draw random rows, int64 [size], for a batch. Only a stream's rows depend on the number of the batch."""
        return torch.randint(len(self), (size,), generator=generator)

    def posteriors(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posteriors' means and standard deviations of rows, [B, C, H, W]."""
        return self.mean[row], self.std[row]

    def conditions(self, row: Tensor) -> dict[str, Tensor]:
        """Return the encoded captions of rows, [B, …]."""
        return {name: tensor[row] for name, tensor in self.condition.items()}

    def draw(self, size: int, generator: torch.Generator, batch: int = 0) -> tuple[Tensor, Tensor]:
        """Draw x₀, float32 [B, C, H, W], from the posteriors of random rows; return x₀ and the rows, int64 [B]."""
        rows = self.rows(size, generator, batch)
        noise = torch.randn((size, *self.mean.shape[1:]), generator=generator)
        mean, std = self.posteriors(rows)
        return mean.float() + std.float() * noise, rows

    @cached_property
    def figures(self) -> Figures:
        """The figures of the posteriors' means. They are computed once, because they read the whole pool."""
        data = self.mean.float()
        apart = (data[::2][: len(data) // 2] - data[1::2]).flatten(1).norm(dim=1).mean()
        return Figures(data.mean((0, 2, 3)), data.std((0, 2, 3)), data.mean((2, 3)).std(0), apart)


CONDITION = "condition."
"""The prefix of the condition's tensors in a pool's file."""

_CUT = "cut"
"""The key in a part's metadata of how many of its captions are longer than the text encoder takes."""

AGAIN = "delete the file to encode the data again"

PART = 16
"""Batches in one part file. With 64 images a batch, an interruption loses at most 1,024 images."""


def model_image_size(model: Model) -> tuple[int, int]:
    """Return the size (H, W) in pixels of the images that a loaded model draws."""
    return decoded_size(model.latent_shape[1:], model.pipeline.vae.config, model.reference)


def image_side(model: Model) -> int:
    """Return the side in pixels of the images that a model draws.

    Raises:
        DdilError: the images are not square.
    """
    height, width = model_image_size(model)
    if height != width:
        raise DdilError(
            f"the model {model.reference!r} draws images of {height} x {width} pixels (height x width), but data are "
            "prepared as squares; name a model of square images"
        )
    return height


@torch.no_grad()
def encode_pool(model: Model, data: DataSet, size: int, path: Path, batch_size: int = 64) -> LatentPool:
    """Encode the first ``size`` training images and store them, or read the file where it exists.

    All processes of the command call this, and each encodes a share. The work is stored in parts, so that an
    interrupted call goes on where it stopped. The parts lie in a folder beside ``path`` until all images are encoded.

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
        ranks.barrier()  # all parts are here
        if ranks.is_main():
            _warn_of_cut(parts, size)
            write_tensors(path, _joined(parts, size), writing=with_checksum)
        ranks.barrier()
    if ranks.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    return _read_pool(path)


def _encode_parts(model: Model, data: DataSet, size: int, folder: Path, batch_size: int) -> list[Path]:
    """Encode the parts that the folder lacks, of ``PART`` batches each, and return the files of all parts in order.

    Each process takes neighbouring ones of the missing parts, because some data sets read up to a part. Each image is
    in the same batch whatever the number of processes.
    """
    side = image_side(model)
    # "pictures" stays: parts of earlier versions carry these words.
    metadata = {"data": data.identity(), "of": f"{size} pictures of {side} px in batches of {batch_size}"}
    parts = [folder / f"{index:05d}.safetensors" for index in range(math.ceil(size / (PART * batch_size)))]
    if ranks.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        delete_others(folder, parts, metadata)
    ranks.barrier()
    missing = [index for index, part in enumerate(parts) if not part.is_file()]
    ranks.barrier()  # none is written before all have looked
    first, end = (place * len(missing) // ranks.world() for place in (ranks.rank(), ranks.rank() + 1))
    own = missing[first:end]
    total = sum(min(PART * batch_size, size - index * PART * batch_size) for index in own)
    with (
        model.compute.precision(),
        progress("encode the data", total=total) as advance,
        on_device(model.text_encoders(), model.device),
    ):
        batches, following = iter(list[tuple[np.ndarray, list[str]]]()), -1
        for index in own:
            if index != following:
                batches = data.training(size, side, batch_size, first=index * PART)
            encoded = []
            for images, captions in islice(batches, PART):
                encoded.append(encode_batch(model, images, captions))
                advance(len(images))
            cut = str(sum(longer for _, longer in encoded))
            tensors = {name: torch.cat([part[name] for part, _ in encoded]) for name in encoded[0][0]}
            write_tensors(parts[index], tensors, metadata | {_CUT: cut}, writing=with_checksum)
            following = index + 1
    return parts


def _warn_of_cut(parts: list[Path], size: int) -> None:
    """Warn of captions that are not read whole."""
    cut = 0
    for path in parts:
        with safe_open(path, "pt") as part:
            cut += int(part.metadata().get(_CUT, 0))
    if cut:
        warn(f"{cut} of {size} captions are longer than the text encoder takes; the rest of each is not read")


def encode_batch(model: Model, images: np.ndarray, captions: list[str]) -> tuple[dict[str, Tensor], int]:
    """Encode a batch; return its tensors by their names in the file, and how many of its captions are cut."""
    pixels = model.values(images)
    # Encoding needs less memory than decoding.
    at_once = decode_batch(model.pipeline.vae, *model.latent_shape[1:], model.device, MOST_ENCODED)
    posteriors = [model.encode_images(part) for part in pixels.split(max(at_once, 1))]
    condition = model.encode(captions).tensors
    mean, std = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
    tensors = {"mean": mean, "std": std} | {CONDITION + name: tensor for name, tensor in condition.items()}
    stored = {name: tensor.to(model.layout.images.stored) for name, tensor in tensors.items()}
    if not all_finite(stored.values()):
        raise DdilError(
            f"the encoded images or captions of the model {model.reference!r} are too large for float16 "
            "(above 65,504); check its autoencoder's scaling_factor"
        )
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}, model.cut(captions)


def delete_others(folder: Path, parts: list[Path], metadata: dict[str, str], keep: Sequence[str] = ()) -> None:
    """Delete damaged parts, and those of other data, that an interrupted call left. ``keep`` names other files."""
    for path in sorted(path for path in folder.iterdir() if path.suffix != SUFFIX and path.name not in keep):
        try:
            require_checksum(path, "the part", AGAIN)
            with safe_open(path, "pt") as part:
                fits = (part.metadata() or {}).items() >= metadata.items() and path in parts
        except (SafetensorError, Damaged):
            fits = False
        if not fits:
            delete_with_checksum(path)


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
        names = [name for name in tensors if name.startswith(CONDITION)]
        condition = {name.removeprefix(CONDITION): tensors.pop(name) for name in names}
        pool = LatentPool(**tensors, condition=condition)
    except (SafetensorError, TypeError, OSError) as error:
        raise DdilError(f"the encoded data {path} is damaged; {AGAIN}") from error
    if not all_finite(part for tensor in (pool.mean, pool.std) for part in tensor.split(1024)):
        raise DdilError(f"the encoded data {path} has values that are not finite; {AGAIN}")
    return pool
