"""Captioned pictures by reference, as streams whose batches depend on their index alone; and their encoded pool."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddil_core.errors import DdilError, WrongCommand
from ddil_core.models import Model
from ddil_core.progress import progress, warn


@dataclass(frozen=True)
class Prompt:
    """A prompt of the evaluation split, with the name that its noise is drawn from."""

    id: str
    text: str


class DataSet(Protocol):
    """Captioned pictures: an endless training stream, and an evaluation split in a fixed order."""

    reference: str

    def batch(self, size: int, index: int) -> tuple[np.ndarray, list[str]]:
        """The ``index``-th training batch: pictures uint8 [B, H, W, 3] and captions."""
        ...

    def prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` prompts of the evaluation split."""
        ...

    def pictures(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """The first ``count`` pictures of the evaluation split, in batches uint8 [B, H, W, 3]."""
        ...


KINDS = {"shapes": "shapes", "coco2014": "coco2014:DIR", "coco2017": "coco2017:DIR", "folder": "folder:DIR"}
"""The kinds of data sets, and how each is written."""


def open_data(reference: str) -> DataSet:
    """A data set by reference.

    Raises:
        WrongCommand: the reference fits nothing; the message names the nearest that would.
    """
    if reference == "shapes":
        from ddil_core.shapes.data import ShapesData

        return ShapesData()
    kind, colon, _ = reference.partition(":")
    if colon and kind in ("coco2014", "coco2017"):
        from ddil_core.coco import coco_data

        return coco_data(reference)
    if colon and kind == "folder":
        from ddil_core.folder import folder_data

        return folder_data(reference)
    nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    hint = f"; did you mean {KINDS[nearest[0]]!r}?" if nearest else ""
    accepted = ", ".join(map(repr, KINDS.values()))
    raise WrongCommand(f"the data set {reference!r} is not known: it may be one of {accepted}{hint}")


def listing() -> list[dict[str, Any]]:
    """The data sets that there are, for ``ddil data``."""
    return [
        {
            "name": "shapes",
            "description": "captioned pictures of one or two objects, 64 px, drawn on the fly; held-out pairs for evaluation",
            "source": "drawn by the package",
            "here": True,
            "needs": "",
        },
        *(
            {
                "name": f"coco{year}:DIR",
                "description": f"COCO {year} val, {count} pictures with captions, for evaluation",
                "source": "images.cocodataset.org",
                "here": None,
                "needs": f"DIR/val{year}/ and DIR/annotations/captions_val{year}.json",
            }
            for year, count in ((2014, "40,504"), (2017, "5,000"))
        ),
        {
            "name": "folder:DIR",
            "description": "a folder of pictures, with a .txt beside each or an index, for evaluation",
            "source": "your own",
            "here": None,
            "needs": "pictures; for captions .txt files, index.jsonl, metadata.jsonl or metadata.csv",
        },
    ]


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
