"""Small WebDataset shards, written by the library itself."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import webdataset
from PIL import Image

from tests.coco import photograph


def picture(place: int, format: str = "PNG") -> bytes:
    """The file of ``tests.coco.photograph``."""
    with io.BytesIO() as file:
        Image.fromarray(photograph(place)).save(file, format=format)
        return file.getvalue()


def save_shard(path: Path, samples: Iterable[dict[str, bytes]], start: int = 0) -> Path:
    """A shard of samples, bytes by ending; the first is called ``start``."""
    with webdataset.TarWriter(str(path)) as shard:
        for number, sample in enumerate(samples, start):
            shard.write({"__key__": f"{number:04d}"} | sample)
    return path


def save_shards(folder: Path, count: int = 3, size: int = 4) -> str:
    """``train-0.tar`` … of ``size`` pictures each, captioned "picture N"; returns the reference that names them."""
    for shard in range(count):
        places = range(shard * size, (shard + 1) * size)
        samples = ({"png": picture(place), "txt": f" picture\n{place} ".encode()} for place in places)
        save_shard(folder / f"train-{shard}.tar", samples, places[0])
    return f"webdataset:{folder}/train-{{0..{count - 1}}}.tar"
