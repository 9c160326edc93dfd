"""Folders of pictures in files, with captions, as a data set."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.dataset import Prompt
from ddil_core.data.pictures import (
    Picture,
    clean_caption,
    files_sha256,
    named,
    prepared,
    read_picture,
    refuse,
    refuse_fewer,
    require_training,
    survey,
)
from ddil_core.errors import DdilError, WrongCommand
from ddil_core.paths import user_path

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
INDEXES = ("index.jsonl", "metadata.jsonl", "metadata.csv")
"""Files that may say which pictures a folder holds, the first that is there: rows with a ``file`` (or ``file_name``), and
where there are such a ``prompt`` (or ``caption``, ``text``) and an ``id``."""

TRAIN_ORDER = 0
"""The seed of the order in which pictures in files are trained on."""


class PictureFiles:
    """A data set (``ddil_core.data.dataset.DataSet``) that lies in picture files."""

    split = "all"
    side: int | None = None

    def __init__(self, reference: str, files: list[Picture]) -> None:
        self.reference = reference
        self.files = files

    def training_files(self) -> list[Picture]:
        """The pictures to train on, in the order of their index or names."""
        return self.files

    def identity(self) -> str:
        """A hash of the training pictures' ids and captions, which decide their order too."""
        content = "\n".join(f"{picture.id}\t{picture.caption}" for picture in self.training_files())
        return hashlib.sha256(content.encode()).hexdigest()

    def require(self, count: int, side: int) -> None:
        """Look at the training pictures' captions and heads, and warn of what preparation changes but for the crop.

        Raises:
            WrongCommand: there are fewer, or some have no caption.
            DdilError: some are missing or damaged.
        """
        files, chosen = self.training_files(), self._chosen(count)
        require_training((files[place] for place in sorted(chosen)), side, self.reference, "put a .txt beside each")

    def training(
        self, count: int, side: int, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See ``DataSet``. The pictures come in one shuffled order, and none twice.

        Raises:
            WrongCommand: there are fewer.
            DdilError: some are missing or damaged.
        """
        files, chosen = self.training_files(), self._chosen(count)[first * batch_size :]
        return prepared((files[place] for place in chosen), side, batch_size, count, self.reference)

    def _chosen(self, count: int) -> list[int]:
        """The places of the first ``count`` training pictures in the shuffled order."""
        there = len(self.training_files())
        refuse_fewer(there, count, self.reference)
        order: list[int] = np.random.default_rng(TRAIN_ORDER).permutation(there)[:count].tolist()
        return order

    def prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` pictures' captions.

        Raises:
            WrongCommand: there are fewer pictures, or one without a caption.
        """
        files = self.take(count, "prompts")
        silent = [picture.path.name for picture in files if picture.caption is None]
        if silent:
            raise WrongCommand(
                f"{len(silent):,} of {count:,} pictures of {self.reference} have no caption: {named(silent)}; "
                "put a .txt beside each, or name a list of prompts"
            )
        return [Prompt(picture.id, str(picture.caption)) for picture in files]

    def pictures(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """The first ``count`` pictures, each a batch uint8 [1, H, W, 3] of its own, since sizes differ.

        Raises:
            WrongCommand: there are fewer.
            DdilError: some are missing or damaged; all of them are named, once the others have been given.
        """
        files, damaged = self.take(count, "pictures"), []
        survey(files, self.reference)
        for picture in files:
            try:
                image = read_picture(picture.path)
            except DdilError:
                damaged.append(picture.path.name)
                continue
            yield image[None]
        refuse(damaged, "damaged", count, self.reference)

    def pictures_sha256(self, count: int) -> str:
        """A hash of the first ``count`` files (``files_sha256``), under which what was computed from them is kept."""
        return files_sha256(self.take(count, "pictures"))

    def take(self, count: int, what: str) -> list[Picture]:
        """The first ``count`` files. Raises WrongCommand where there are fewer."""
        if count > len(self.files):
            raise WrongCommand(
                f"{self.reference} has {len(self.files):,} pictures, fewer than the {count:,} {what} asked for; "
                "add the others, or ask for fewer"
            )
        return self.files[:count]


def folder_data(reference: str) -> PictureFiles:
    """``folder:DIR``: the pictures that its index names, else all picture files in the order of their names."""
    folder = user_path(reference.partition(":")[2], "the data set's folder")
    if not folder.is_dir():
        raise WrongCommand(f"the data set {reference!r} names no folder: there is no {folder}")
    return PictureFiles(reference, read_folder(folder))


def read_folder(folder: Path) -> list[Picture]:
    """The pictures of a folder with their captions, from its index or from the ``.txt`` beside each.

    Raises:
        WrongCommand: no pictures, an index or a caption that cannot be read, an id twice, two captions for one id.
    """
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is not None:
        pictures = [_picture(folder, row, number, index) for number, row in enumerate(read_rows(index), 1)]
    else:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
        pictures = [Picture(path.stem, path, _beside(path)) for path in files]
    if not pictures:
        raise WrongCommand(f"the folder {folder} holds no pictures ({', '.join(ENDINGS)})")
    refuse_twice([(picture.id, picture.caption) for picture in pictures], str(index or folder))
    return pictures


def _beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    try:
        return clean_caption(text.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, OSError) as error:
        raise WrongCommand(f"the caption {text} cannot be read as UTF-8: {error}; write it again in UTF-8") from error


def _picture(folder: Path, row: dict[str, Any], number: int, index: Path) -> Picture:
    file = first_of(row, "file", "file_name")
    if file is None:
        raise WrongCommand(f"row {number} of {index} names no file; give it a 'file' or 'file_name'")
    caption = first_of(row, "prompt", "caption", "text")
    name = first_of(row, "id")
    return Picture(
        Path(file).stem if name is None else name, folder / file, None if caption is None else clean_caption(caption)
    )


def first_of(row: dict[str, Any], *keys: str) -> str | None:
    """The first of these keys that a row has a value for, as text."""
    return next((str(row[key]) for key in keys if row.get(key) not in (None, "")), None)


def refuse_twice(rows: Iterable[tuple[str, str | None]], source: str) -> None:
    """Refuse (id, caption) rows in which an id stands twice.

    Raises:
        WrongCommand: an id stands twice, with the same caption or with two.
    """
    seen: dict[str, tuple[int, str | None]] = {}
    for number, (name, caption) in enumerate(rows, 1):
        if name in seen:
            first, other = seen[name]
            where = f"in rows {first} and {number} of {source}"
            if other != caption:
                raise WrongCommand(f"the id {name!r} has two captions, {other!r} and {caption!r}, {where}; keep one")
            raise WrongCommand(f"the id {name!r} stands twice, {where}; each picture needs an id of its own")
        seen[name] = (number, caption)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` or ``.csv`` file with a header.

    Raises:
        WrongCommand: it is not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        rows = [
            json.loads(line) for line in text.split("\n") if line.strip()
        ]  # JSON may hold other line ends, as U+2028
    except (ValueError, csv.Error, OSError) as error:
        raise WrongCommand(f"{path} cannot be read as {path.suffix[1:]} in UTF-8: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise WrongCommand(f'{path} holds a line that is no JSON object; each line is one, such as {{"file": "a.png"}}')
    return rows
