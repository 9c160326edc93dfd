"""Folders of pictures in files, with captions, as a data set."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ddil_core.data.base import Prompt
from ddil_core.data.captioned import (
    ImageFile,
    files_sha256,
    name_some,
    prepare_batches,
    read_image,
    refuse_bad,
    refuse_fewer,
    require_training,
    survey,
)
from ddil_core.data.captions import Row, caption_of, decode, read_rows
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import user_path
from ddil_core.support.progress import warn_once
from ddil_core.support.text import require_text

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_ENDINGS = (".avif", ".gif", ".heic", ".jfif", ".jp2", ".jxl", ".pgm", ".ppm", ".tga", ".tif", ".tiff")
"""Endings of pictures that are read only where an index names them."""
INDEXES = ("index.jsonl", "metadata.jsonl", "metadata.csv")
"""Files that may say which pictures a folder holds, the first that is there: rows with a ``file`` (or ``file_name``), and
where there are such a ``prompt`` (or ``caption``, ``text``) and an ``id``."""

TRAIN_ORDER = 0
"""The seed of the order in which pictures in files are trained on."""


class ImageFiles:
    """A data set (``ddil_core.data.base.DataSet``) that lies in picture files."""

    split = "all"
    side: int | None = None

    def __init__(self, reference: str, files: list[ImageFile]) -> None:
        self.reference = reference
        self.files = files

    def training_files(self) -> list[ImageFile]:
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
        return prepare_batches((files[place] for place in chosen), side, batch_size, count, self.reference)

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
                f"{len(silent):,} of {count:,} pictures of {self.reference} have no caption: {name_some(silent)}; "
                "put a .txt beside each, or name a list of prompts"
            )
        return [Prompt(picture.id, str(picture.caption)) for picture in files]

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """The first ``count`` pictures, each a batch uint8 [1, H, W, 3] of its own, since sizes differ.

        Raises:
            WrongCommand: there are fewer.
            DdilError: some are missing or damaged; all of them are named, once the others have been given.
        """
        files, damaged = self.take(count, "pictures"), []
        survey(files, self.reference)
        for picture in files:
            try:
                image = read_image(picture.path)
            except DdilError:
                damaged.append(picture.path.name)
                continue
            yield image[None]
        refuse_bad(damaged, "damaged", count, self.reference)

    def images_sha256(self, count: int) -> str:
        """A hash of the first ``count`` files (``files_sha256``), under which what was computed from them is kept."""
        return files_sha256(self.take(count, "pictures"))

    def take(self, count: int, what: str) -> list[ImageFile]:
        """The first ``count`` files. Raises WrongCommand where there are fewer."""
        if count > len(self.files):
            raise WrongCommand(
                f"{self.reference} has {len(self.files):,} pictures, fewer than the {count:,} {what} asked for; "
                "add the others, or ask for fewer"
            )
        return self.files[:count]


def open_folder(reference: str) -> ImageFiles:
    """``folder:DIR``: the pictures that its index names, else all picture files in the order of their names."""
    folder = user_path(reference.partition(":")[2], "the data set's folder")
    if not folder.is_dir():
        raise WrongCommand(f"the data set {reference!r} names no folder: there is no {folder}")
    return ImageFiles(reference, read_folder(folder))


def read_folder(folder: Path) -> list[ImageFile]:
    """The pictures of a folder with their captions, from its index or from the ``.txt`` beside each.

    Raises:
        WrongCommand: no pictures, an index or a caption that cannot be read, an id twice, two captions for one id.
    """
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    try:
        with os.scandir(folder) as entries:
            found = {folder / entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise WrongCommand(f"the folder {folder} cannot be read: {error}") from error
    files = sorted(path for path, is_folder in found.items() if not is_folder)
    if index is not None:
        pictures = [_picture(folder, row) for row in read_rows(index)]
    else:
        shown = [path for path in files if path.suffix.lower() in ENDINGS and not _hidden(path)]
        pictures = [_named_by_its_file(path) for path in shown]
    _say_left_out(folder, files, set(found).difference(files), pictures, index)
    if not pictures:
        raise WrongCommand(f"the folder {folder} holds no pictures ({', '.join(ENDINGS)})")
    refuse_twice([(picture.id, picture.caption) for picture in pictures], str(index or folder))
    _refuse_file_twice(pictures, str(index or folder))
    return pictures


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _named_by_its_file(path: Path) -> ImageFile:
    require_text(path.name, f"the name of the picture {str(path)!r}")
    return ImageFile(path.stem, path, _beside(path))


def _beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    try:
        return caption_of(decode(text.read_bytes()), f"the caption {text}")
    except (ValueError, OSError) as error:
        raise WrongCommand(f"the caption {text} cannot be read as UTF-8: {error}; write it again in UTF-8") from error


def _picture(folder: Path, row: Row) -> ImageFile:
    file = row.name("file", "file_name")
    if file is None:
        raise WrongCommand(f"{row.where} names no file; give it a 'file' or 'file_name'")
    return ImageFile(row.name("id") or Path(file).stem, folder / file, row.caption())


def _say_left_out(
    folder: Path, files: Iterable[Path], subfolders: Iterable[Path], pictures: Sequence[ImageFile], index: Path | None
) -> None:
    """Warn in one sentence of what looks like pictures or captions in a folder and is not read."""
    read = {picture.path for picture in pictures}
    kinds = Counter(
        "hidden files"
        if _hidden(path)
        else "pictures that it does not name"
        if index is not None
        else f"{path.suffix.lower()} files"
        for path in files
        if path not in read and path.suffix.lower() in (*ENDINGS, *OTHER_ENDINGS)
    )
    texts = {path.with_suffix(".txt") for path in read}
    if index is None:
        kinds[".txt files beside no picture"] = sum(path.suffix == ".txt" and path not in texts for path in files)
        kinds["subfolders with pictures"] = sum(map(_holds_pictures, subfolders))
    else:
        kinds["indexes beside it"] = sum(path.name in INDEXES and path != index for path in files)
        kinds[".txt files beside pictures that it names"] = sum(path in texts for path in files)
    parts = [f"{kind} ({number:,})" for kind, number in sorted(kinds.items()) if number]
    if parts:
        where = f"in the folder {folder}" + ("" if index is None else f", whose pictures {index.name} names,")
        warn_once(f"{where} these are not read: {', '.join(parts)}")


def _holds_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in (*ENDINGS, *OTHER_ENDINGS) for path in folder.rglob("*"))


def _refuse_file_twice(pictures: Sequence[ImageFile], source: str) -> None:
    """Raises WrongCommand: two rows name one file, so that a picture would count twice."""
    seen: dict[Path, int] = {}
    for number, picture in enumerate(pictures, 1):
        first = seen.setdefault(picture.path, number)
        if first != number:
            raise WrongCommand(
                f"the file {picture.name!r} stands twice, in rows {first} and {number} of {source}; name each picture once"
            )


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
