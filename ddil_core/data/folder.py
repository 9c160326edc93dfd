"""Pictures in files, with captions: reading them, saying which are bad, and folders of them as a data set."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddil_core.data.dataset import Prompt
from ddil_core.errors import DdilError, WrongCommand

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
INDEXES = ("index.jsonl", "metadata.jsonl", "metadata.csv")
"""Files that may say which pictures a folder holds, the first that is there: rows with a ``file`` (or ``file_name``), and
where there are such a ``prompt`` (or ``caption``, ``text``) and an ``id``."""

_NAMED = 5


def clean_caption(text: str) -> str:
    """The one way in which captions are cleaned: white space at the ends goes, any other run of it becomes one space.

    Case, punctuation and spelling stay. COCO has captions with line ends and with spaces after the full stop.
    """
    return " ".join(text.split())


def named(names: Sequence[str]) -> str:
    """Some names for a message, with the number of those left out."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


@dataclass(frozen=True)
class Picture:
    """A picture in a file, by the ``id`` that its noise and its rows go by; ``caption`` is None where it has none."""

    id: str
    path: Path
    caption: str | None


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] of a picture file, other modes converted to RGB as Pillow does; EXIF rotation is not applied.

    Raises:
        DdilError: the file is missing or damaged.
    """
    if not path.is_file():
        raise DdilError(f"the picture {path} is missing")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DdilError(f"the picture {path} is damaged ({' '.join(str(error).split())})") from error


@dataclass(frozen=True)
class Survey:
    """What the files' heads say: ``converted`` are those of another mode than RGB, ``sizes`` [(W, H)] one picture of each."""

    converted: list[str]
    sizes: dict[tuple[int, int], str]


def survey(pictures: Sequence[Picture], what: str) -> Survey:
    """Look at the heads of picture files; the pixels are not decoded.

    Raises:
        DdilError: some are missing or no pictures; the message names them and says how many.
    """
    missing, damaged, converted = [], [], []
    sizes: dict[tuple[int, int], str] = {}
    for picture in pictures:
        if not picture.path.is_file():
            missing.append(picture.path.name)
            continue
        try:
            with Image.open(picture.path) as image:
                sizes.setdefault(image.size, picture.path.name)
                if image.mode != "RGB":
                    converted.append(picture.path.name)
        except (OSError, SyntaxError, ValueError):
            damaged.append(picture.path.name)
    _refuse(missing, "missing", len(pictures), what)
    _refuse(damaged, "damaged", len(pictures), what)
    return Survey(converted, sizes)


def _refuse(names: Sequence[str], fault: str, count: int, what: str) -> None:
    if names:
        raise DdilError(
            f"{len(names):,} of {count:,} pictures of {what} are {fault}: {named(names)}; fetch or make them again"
        )


def files_sha256(pictures: Sequence[Picture]) -> str:
    """A hash of picture files' bytes, in their order."""
    content = hashlib.sha256()
    for picture in pictures:
        with picture.path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()


class PictureFiles:
    """A data set (``ddil_core.data.dataset.DataSet``) whose evaluation split lies in picture files, for evaluation only."""

    split = "all"

    def __init__(self, reference: str, files: list[Picture]) -> None:
        self.reference = reference
        self.files = files

    def batch(self, size: int, index: int) -> tuple[np.ndarray, list[str]]:
        """Refused: these pictures are compared with, not trained on."""
        raise WrongCommand(
            f"the data set {self.reference!r} is for evaluation; --data of 'ddil distill' may be 'shapes'"
        )

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
        _refuse(damaged, "damaged", count, self.reference)

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
    folder = Path(reference.partition(":")[2]).expanduser()
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
