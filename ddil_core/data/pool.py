"""A data set's training pictures, encoded once: what distillation draws its data from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddil_core.data.dataset import DataSet
from ddil_core.errors import DdilError
from ddil_core.models.model import Model
from ddil_core.progress import progress, warn


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


def _read_pool(path: Path) -> LatentPool:
    try:
        tensors = load_file(path)
        told = {name.removeprefix(_TOLD): tensors.pop(name) for name in list(tensors) if name.startswith(_TOLD)}
        return LatentPool(**tensors, condition=told)
    except (SafetensorError, TypeError, OSError) as error:
        raise DdilError(f"the encoded data {path} is damaged; delete the file to encode the data again") from error


@torch.no_grad()
def encode_pool(model: Model, data: DataSet, size: int, path: Path, batch_size: int = 64) -> LatentPool:
    """Encode the first ``size`` training pictures once and keep them at ``path``; read them back where that is done."""
    if path.is_file():
        return _read_pool(path)
    means, stds, told, cut = [], [], [], 0
    with progress("encode the data", total=size) as advance:
        for index, start in enumerate(range(0, size, batch_size)):
            images, captions = data.batch(min(batch_size, size - start), index)
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            mean, std = model.encode_images(pixels)
            means.append(mean.half().cpu().contiguous())
            stds.append(std.half().cpu().contiguous())
            condition = model.encode(captions)
            told.append({name: tensor.half().cpu() for name, tensor in condition.tensors.items()})
            cut += model.cut(captions)
            advance(len(images))
    if cut:
        warn(f"{cut} of {size} captions are longer than the text encoder takes; the rest of each is not read")
    pool = {"mean": torch.cat(means), "std": torch.cat(stds)}
    conditions = {name: torch.cat([part[name] for part in told]) for name in told[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file(pool | {_TOLD + name: tensor for name, tensor in conditions.items()}, temporary)
    temporary.replace(path)
    return LatentPool(**pool, condition=conditions)
