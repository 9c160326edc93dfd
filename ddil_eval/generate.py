"""Pictures to be scored, as a sized sequence of batches: drawn by a model from prompts, or read from a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ddil_core.data.dataset import Prompt
from ddil_core.data.folder import INDEXES, Picture, read_folder, read_picture, survey
from ddil_core.errors import DdilError, WrongCommand
from ddil_core.models.model import Model
from ddil_core.noise import Sample
from ddil_core.sample import draw
from ddil_core.sampling import Sampling
from ddil_eval.store import digest, replacing, write_text

INDEX = INDEXES[0]
MADE = "made.json"
"""Beside the index of kept pictures: the model and how it was sampled, so that a later score says it too."""


@dataclass(frozen=True)
class Batch:
    """Pictures uint8 [B, H, W, 3] with their prompts, of which ``start`` came before."""

    start: int
    images: np.ndarray
    prompts: Sequence[Prompt]

    @property
    def captions(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]


class Batches(Protocol):
    """A sized sequence of batches; any of them can be asked for by itself, so that an interrupted pass goes on."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


@dataclass(frozen=True)
class Generated:
    """One picture for each prompt, drawn when its batch is asked for; its noise comes from (prompt id, seed) alone."""

    model: Model
    prompts: Sequence[Prompt]
    sampling: Sampling
    seed: int
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        start, part = _part(self.prompts, index, self.batch_size)
        samples = [Sample(prompt.id) for prompt in part]
        images = draw(self.model, samples, [prompt.text for prompt in part], self.sampling, self.seed)
        return Batch(start, images, part)


@dataclass(frozen=True)
class Saved:
    """The pictures of a folder, read when their batch is asked for. A picture without a caption has the empty one."""

    files: Sequence[Picture]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        start, part = _part(self.files, index, self.batch_size)
        images = np.stack([read_picture(picture.path) for picture in part])
        return Batch(start, images, [Prompt(picture.id, picture.caption or "") for picture in part])


def _part(rows: Sequence[Any], index: int, size: int) -> tuple[int, Sequence[Any]]:
    if not 0 <= index < -(-len(rows) // size):
        raise IndexError(index)
    return index * size, rows[index * size : (index + 1) * size]


def open_saved(folder: Path, count: int | None) -> list[Picture]:
    """The pictures of a folder that a model made, this program's or another: those that its index names, else in file order.

    Raises:
        WrongCommand: no such folder, fewer pictures than ``count``, or pictures of different sizes.
        DdilError: some are missing or damaged.
    """
    if not folder.is_dir():
        raise WrongCommand(f"there is no folder {folder} with pictures to score")
    files = read_folder(folder)
    if count is not None and count > len(files):
        raise WrongCommand(
            f"the folder {folder} has {len(files):,} pictures, fewer than the {count:,} asked for; "
            "make the others, or ask for fewer"
        )
    files = files[:count]
    sizes = survey(files, str(folder)).sizes
    if len(sizes) > 1:
        examples = ", ".join(f"{width} × {height} px ({name})" for (width, height), name in sorted(sizes.items()))
        raise WrongCommand(
            f"the pictures of {folder} have {len(sizes)} sizes, {examples}; a model's have one, so score them apart"
        )
    return files


@dataclass(frozen=True)
class Made:
    """How pictures were made, as a record says it; of another program's only ``reference`` is known.

    ``pictures_sha256`` is a hash of the files that they are read from.
    """

    reference: str
    weights_sha256: str | None = None
    solver: str = "unknown"
    grid: tuple[int | float, ...] = ()
    guidance_scale: float | None = None
    nfe: float | None = None
    seed: int | None = None
    pictures_sha256: str | None = None
    reflection: str = "none"

    @classmethod
    def read(cls, folder: Path) -> Made:
        """What lies beside the pictures; where nothing does, the folder's own name."""
        path = folder / MADE
        if not path.is_file():
            return cls(str(folder))
        try:
            told = json.loads(path.read_text())
            known = {field.name: told[field.name] for field in fields(cls) if field.name in told}
            return cls(**known | {"grid": tuple(told["grid"])})
        except (ValueError, TypeError, KeyError) as error:
            raise DdilError(f"the file {path} is damaged; delete it to score the pictures without it") from error


class Keeper:
    """Keeps drawn pictures as PNG in a folder of their own; ``close`` writes the index, with ``id, file, prompt, seed`` a line.

    Raises:
        WrongCommand: the folder holds something else.
    """

    def __init__(self, folder: Path, made: Made, prompts: Sequence[Prompt]) -> None:
        self.folder, self.made, self.prompts = folder, made, prompts
        drawn = {
            "prompt_ids_sha256": digest([prompt.id for prompt in prompts]),
            "captions_sha256": digest([prompt.text for prompt in prompts]),
        }
        path, text = folder / MADE, json.dumps(asdict(made) | drawn, indent=2) + "\n"
        if path.is_file() and path.read_text() != text:
            raise WrongCommand(f"the folder {folder} holds pictures that were made otherwise; choose another --out")
        if not path.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise WrongCommand(f"the folder {folder} is not empty and holds no kept pictures; choose another --out")
        (folder / INDEX).unlink(missing_ok=True)  # the new one stands once all pictures do
        write_text(path, text)

    def keep(self, batch: Batch) -> None:
        """Write a batch's pictures, each whole or not at all."""
        for place, image in enumerate(batch.images, batch.start):
            with replacing(self.folder / _file(place)) as temporary:
                Image.fromarray(image).save(temporary)

    def close(self) -> None:
        """Write the index over all pictures."""
        rows = [
            {"id": prompt.id, "file": _file(place), "prompt": prompt.text, "seed": self.made.seed}
            for place, prompt in enumerate(self.prompts)
        ]
        write_text(self.folder / INDEX, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _file(place: int) -> str:
    return f"{place:06d}.png"


@dataclass(frozen=True)
class Opened:
    """What a row's pictures come from, ready: how they are made, the batches, and who keeps them, if anyone does."""

    made: Made
    batches: Batches
    keeper: Keeper | None = None


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "pictures"
