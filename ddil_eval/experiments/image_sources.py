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
from pydantic import TypeAdapter

from ddil_core.data.base import Prompt
from ddil_core.data.folder import INDEXES, ImageFile, read_folder, read_image, survey
from ddil_core.diffusion.noise import Sample
from ddil_core.models.generate import sample_images
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support import ranks
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import delete_temporaries, replacing, write_text
from ddil_eval.report.records import digest

INDEX = INDEXES[0]
MADE = "made.json"
"""Beside the index of kept pictures: the model and how it was sampled, so that a later score says it too."""


@dataclass(frozen=True)
class ImageBatch:
    """Pictures uint8 [P · number, H, W, 3] of P prompts, ``number`` of each one after another; ``start`` prompts came before."""

    start: int
    images: np.ndarray
    prompts: Sequence[Prompt]
    number: int = 1

    @property
    def captions(self) -> list[str]:
        """A caption for each picture."""
        return [prompt.text for prompt in self.prompts for _ in range(self.number)]


class ImageBatches(Protocol):
    """A sized sequence of batches; any of them can be asked for by itself, so that an interrupted pass goes on.

    Each prompt has ``number`` pictures, each batch but the last ``per_batch`` prompts.
    """

    @property
    def number(self) -> int: ...

    @property
    def per_batch(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageBatch: ...


@dataclass(frozen=True)
class GeneratedImages:
    """``number`` pictures of each prompt, drawn when their batch is asked for; noise comes from (prompt id, place, seed) alone.

    ``batch_size`` is that of pictures; the first picture of a prompt is the one that it has where it has one.
    """

    model: Model
    prompts: Sequence[Prompt]
    sampling: Sampling
    seed: int
    batch_size: int
    number: int = 1

    @property
    def per_batch(self) -> int:
        return max(1, self.batch_size // self.number)

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.per_batch)

    def __getitem__(self, index: int) -> ImageBatch:
        start, part = _part(self.prompts, index, self.per_batch)
        samples = [Sample(prompt.id, place) for prompt in part for place in range(self.number)]
        texts = [prompt.text for prompt in part for _ in range(self.number)]
        return ImageBatch(start, sample_images(self.model, samples, texts, self.sampling, self.seed), part, self.number)


@dataclass(frozen=True)
class FolderImages:
    """The pictures of a folder, read when their batch is asked for. A picture without a caption has the empty one.

    Every ``number`` pictures that follow one another are of one prompt, which goes by the first one's id.
    """

    files: Sequence[ImageFile]
    batch_size: int
    number: int = 1

    @property
    def per_batch(self) -> int:
        return max(1, self.batch_size // self.number)

    def __len__(self) -> int:
        return -(-len(self.files) // (self.per_batch * self.number))

    def __getitem__(self, index: int) -> ImageBatch:
        start, part = _part(self.files, index, self.per_batch * self.number)
        images = np.stack([read_image(picture.path) for picture in part])
        prompts = [Prompt(picture.id, picture.caption or "") for picture in part[:: self.number]]
        return ImageBatch(start // self.number, images, prompts, self.number)


def _part(rows: Sequence[Any], index: int, size: int) -> tuple[int, Sequence[Any]]:
    if not 0 <= index < -(-len(rows) // size):
        raise IndexError(index)
    return index * size, rows[index * size : (index + 1) * size]


def open_image_folder(folder: Path, count: int | None) -> list[ImageFile]:
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
    found = survey(files, str(folder))
    sizes = found.sizes
    if len(sizes) > 1:
        examples = ", ".join(f"{width} × {height} px ({name})" for (width, height), name in sorted(sizes.items()))
        raise WrongCommand(
            f"the pictures of {folder} have {len(sizes)} sizes, {examples}; a model's have one, so score them apart"
        )
    found.warn_of_changes()
    return files


@dataclass(frozen=True)
class ImageOrigin:
    """How pictures were made, as a record says it; of another program's only ``reference`` is known.

    ``images_sha256`` is a hash of the files that they are read from.
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
    def read(cls, folder: Path) -> ImageOrigin:
        """What lies beside the pictures; where nothing does, the folder's own name."""
        path = folder / MADE
        if not path.is_file():
            return cls(str(folder))
        try:
            told = json.loads(path.read_bytes())
            known = {field.name: told[field.name] for field in fields(cls) if field.name in told}
            return _MADE.validate_python(known)
        except (ValueError, TypeError, OSError, RecursionError) as error:  # pydantic's own error is a ValueError
            raise DdilError(f"the file {path} is damaged; delete it to score the pictures without it") from error


_MADE = TypeAdapter(ImageOrigin)


class ImageWriter:
    """Keeps drawn pictures as PNG in a folder of their own; ``close`` writes the index, with ``id, file, prompt, seed`` a line.

    Of several pictures of a prompt each has the prompt's id with its own place after it.

    Raises:
        WrongCommand: the folder holds something else.
    """

    def __init__(self, folder: Path, made: ImageOrigin, prompts: Sequence[Prompt], number: int = 1) -> None:
        self.folder, self.made, self.prompts, self.number = folder, made, prompts, number
        with ranks.main_first():
            self._begin()

    def _begin(self) -> None:
        folder = self.folder
        drawn: dict[str, str | int] = {
            "prompt_ids_sha256": digest([prompt.id for prompt in self.prompts]),
            "captions_sha256": digest([prompt.text for prompt in self.prompts]),
        }
        if self.number > 1:
            drawn["pictures_per_prompt"] = self.number
        path, text = folder / MADE, json.dumps(asdict(self.made) | drawn, indent=2) + "\n"
        if path.is_file() and path.read_bytes() != text.encode():
            try:
                ImageOrigin.read(folder)
            except DdilError as error:
                raise DdilError(
                    f"the file {path} is damaged, so that nobody knows how the pictures beside it were made; delete the folder to "
                    "draw them again"
                ) from error
            raise WrongCommand(f"the folder {folder} holds pictures that were made otherwise; choose another --out")
        if ranks.is_main():
            delete_temporaries(folder)  # of a process that was killed
        if not path.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise WrongCommand(f"the folder {folder} is not empty and holds no kept pictures; choose another --out")
        if ranks.is_main():
            (folder / INDEX).unlink(missing_ok=True)  # the new one stands once all pictures do
            write_text(path, text)

    def has(self, start: int, count: int) -> bool:
        """Whether all pictures of ``count`` prompts, before which there are ``start``, are kept."""
        places = range(start * self.number, (start + count) * self.number)
        return all((self.folder / _file(place)).is_file() for place in places)

    def keep(self, batch: ImageBatch) -> None:
        """Write a batch's pictures, each whole or not at all."""
        for place, image in enumerate(batch.images, batch.start * self.number):
            with replacing(self.folder / _file(place)) as temporary:
                Image.fromarray(image).save(temporary)

    def close(self) -> None:
        """Write the index over all pictures."""
        one = self.number == 1
        rows = [
            {"id": prompt.id if one else f"{prompt.id}-{n}", "file": _file(place * self.number + n), "prompt": prompt.text,
             "seed": self.made.seed}
            for place, prompt in enumerate(self.prompts)
            for n in range(self.number)
        ]  # fmt: skip
        write_text(self.folder / INDEX, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _file(place: int) -> str:
    return f"{place:06d}.png"


@dataclass(frozen=True)
class ImageSource:
    """What a row's pictures come from, ready: how they are made, the batches, and who keeps them, if anyone does."""

    made: ImageOrigin
    batches: ImageBatches
    keeper: ImageWriter | None = None


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "pictures"
