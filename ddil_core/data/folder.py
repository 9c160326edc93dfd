"""A folder of image files with captions as a data set."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ddil_core.data.base import Prompt, Side
from ddil_core.data.captioned import (
    CHANGED,
    ImageFile,
    files_sha256,
    name_some,
    prepare_batches,
    refuse_bad,
    refuse_fewer,
    require_training,
    survey,
)
from ddil_core.data.captions import CAPTION_FILE, Row, caption_of, read_rows, read_text
from ddil_core.support.checksums import read_manifest, require_digest
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.outside import inside
from ddil_core.support.paths import shown, user_path
from ddil_core.support.progress import warn_once
from ddil_core.support.text import require_text

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_ENDINGS = (".avif", ".gif", ".heic", ".jfif", ".jp2", ".jxl", ".pgm", ".ppm", ".tga", ".tif", ".tiff")
"""Endings of images that are read only where an index names them."""
INDEXES = ("index.jsonl", "metadata.jsonl", "metadata.csv")
"""The files that may list a folder's images; the first that exists counts.

Each row has a ``file`` (or ``file_name``). It may have a ``prompt`` (or ``caption``, ``text``) and an ``id``.
"""

OVERVIEW = "grid.png"
"""The overview that ``ddil sample`` writes beside its images. It is no image of the data, and no index names it."""

TRAIN_ORDER = 0
"""The seed of the order of training."""


class ImageFiles:
    """A ``ddil_core.data.base.DataSet`` in image files. Only training resizes the images."""

    split = "all"
    side: int | None = None

    def __init__(self, reference: str, files: list[ImageFile]) -> None:
        self.reference = reference
        self.files = files

    def training_files(self) -> list[ImageFile]:
        """Return the training images, in the order of the index or of the file names."""
        return self.files

    def identity(self) -> str:
        """Return a hash of the training images' ids and captions, in their order."""
        content = "\n".join(f"{image.id}\t{image.caption}" for image in self.training_files())
        return hashlib.sha256(content.encode()).hexdigest()

    def require(self, count: int, side: Side) -> None:
        """Check the training images' captions and heads, and warn of what preparation changes beside the crop.

        Raises:
            WrongCommand: there are too few images, or images have no caption.
            DdilError: images are missing or damaged.
        """
        files, chosen = self.training_files(), self._chosen(count)
        require_training((files[place] for place in sorted(chosen)), side, self.reference, "put a .txt beside each")

    def training(
        self, count: int, side: Side, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See ``DataSet``. The images come in one shuffled order, each of them once.

        Raises:
            WrongCommand: there are too few images.
            DdilError: images are missing or damaged.
        """
        files, chosen = self.training_files(), self._chosen(count)[first * batch_size :]
        return prepare_batches((files[place] for place in chosen), side, batch_size, count, self.reference)

    def _chosen(self, count: int) -> list[int]:
        """Return the places of the first ``count`` training images in the shuffled order."""
        available = len(self.training_files())
        refuse_fewer(available, count, self.reference)
        order: list[int] = np.random.default_rng(TRAIN_ORDER).permutation(available)[:count].tolist()
        return order

    def prompts(self, count: int) -> list[Prompt]:
        """Return the captions of the first ``count`` images as prompts.

        Raises:
            WrongCommand: there are too few images, or images have no caption.
        """
        files = self.take(count, "prompts")
        uncaptioned = [file.name for file in files if file.caption is None]
        if uncaptioned:
            raise WrongCommand(
                f"{len(uncaptioned):,} of {count:,} images of {self.reference} have no caption: "
                f"{name_some(uncaptioned)}; put a .txt beside each, or take --prompts where the command has it"
            )
        return [Prompt(file.id, str(file.caption)) for file in files]

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """Yield the first ``count`` images as batches uint8 [1, H, W, 3]: their sizes may differ.

        Raises:
            WrongCommand: there are too few images.
            DdilError: images are missing or damaged; the message names them after the good images were yielded.
        """
        files, damaged = self.take(count, "images"), []
        survey(files, self.reference)
        for file in files:
            try:
                image = file.read()
            except DdilError:
                damaged.append(file.name)
                continue
            yield image[None]
        refuse_bad(damaged, "damaged", count, self.reference)

    def images_sha256(self, count: int) -> str:
        """Return a hash of the first ``count`` files (see ``files_sha256``). Stored features are found by this hash."""
        return files_sha256(self.take(count, "images"))

    def take(self, count: int, what: str) -> list[ImageFile]:
        """Return the first ``count`` files. Raises WrongCommand, which calls them ``what``, where there are fewer."""
        if count > len(self.files):
            raise WrongCommand(
                f"{self.reference} has {len(self.files):,} images, fewer than the {count:,} {what} asked for; "
                "add the others, or ask for fewer"
            )
        return self.files[:count]


def open_folder(reference: str) -> ImageFiles:
    """Open ``folder:DIR``: the images that its index names, or else all image files in the order of their names."""
    folder = user_path(reference.partition(":")[2], "the data set's folder")
    if not folder.is_dir():
        raise WrongCommand(f"the data set {reference!r} names no folder: there is no {folder}")
    return ImageFiles(reference, read_folder(folder))


def read_folder(folder: Path) -> list[ImageFile]:
    """Read which images a folder holds, with their captions from its index or from the ``.txt`` beside each.

    Where the folder has checksums (``sha256.json``), the index is checked now, and each image when it is read.

    Raises:
        WrongCommand: there are no images, an index or a caption cannot be read, or an id or a file occurs twice.
        DdilError: the index or the list of checksums is damaged.
    """
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    digests = read_manifest(folder, "the images", CHANGED) or {}
    try:
        with os.scandir(folder) as entries:
            is_folder = {folder / entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise WrongCommand(f"the folder {folder} cannot be read: {error}") from error
    files = sorted(path for path, value in is_folder.items() if not value)
    if index is not None:
        require_digest(index, digests.get(index.name), "the images", CHANGED)
        images = [_indexed_image(folder, row) for row in read_rows(index)]
    else:
        visible = [path for path in files if path.suffix.lower() in ENDINGS and not _hidden(path)]
        images = [_named_by_its_file(path) for path in visible]
    _warn_of_ignored(folder, files, set(is_folder).difference(files), images, index)
    if not images:
        raise WrongCommand(f"the folder {folder} holds no images ({', '.join(ENDINGS)})")
    refuse_twice([(image.id, image.caption) for image in images], str(index or folder))
    _refuse_file_twice(images, str(index or folder))
    return [replace(image, sha256=digests.get(image.path.relative_to(folder).as_posix())) for image in images]


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _named_by_its_file(path: Path) -> ImageFile:
    require_text(path.name, f"the name of the image {str(path)!r}")
    return ImageFile(path.stem, path, _caption_beside(path))


def _caption_beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    try:
        return caption_of(read_text(text, CAPTION_FILE), f"the caption {text}")
    except (ValueError, OSError) as error:
        raise WrongCommand(f"the caption {text} cannot be read as UTF-8: {error}; write it again in UTF-8") from error


def _indexed_image(folder: Path, row: Row) -> ImageFile:
    file = row.name("file", "file_name")
    if file is None:
        raise WrongCommand(f"{row.where} names no file; give it a 'file' or 'file_name'")
    if not inside(file):
        raise WrongCommand(
            f"{row.where} names the file {shown(file)}, which lies outside of the folder; name a file in the folder"
        )
    return ImageFile(row.name("id") or Path(file).stem, folder / file, row.caption())


def _warn_of_ignored(
    folder: Path, files: Iterable[Path], subfolders: Iterable[Path], images: Sequence[ImageFile], index: Path | None
) -> None:
    """Warn in one sentence of files and subfolders that look like images or captions but are not read.

    Args:
        folder: The folder.
        files: All files of the folder.
        subfolders: All subfolders of the folder.
        images: The images that are read.
        index: The folder's index; None where there is none.
    """
    read = {image.path for image in images}
    kinds = Counter(
        "hidden files"
        if _hidden(path)
        else "images that the index does not name"
        if index is not None
        else f"{path.suffix.lower()} files"
        for path in files
        if path not in read
        and not (index is not None and path.name == OVERVIEW)
        and path.suffix.lower() in (*ENDINGS, *OTHER_ENDINGS)
    )
    texts = {path.with_suffix(".txt") for path in read}
    if index is None:
        kinds[".txt files without an image"] = sum(
            path.suffix.lower() == ".txt" and path not in texts for path in files
        )
        kinds["subfolders with images"] = sum(map(_holds_images, subfolders))
    else:
        kinds["other indexes"] = sum(path.name in INDEXES and path != index for path in files)
        kinds[".txt files beside images of the index"] = sum(path in texts for path in files)
    parts = [f"{kind} ({number:,})" for kind, number in sorted(kinds.items()) if number]
    if parts:
        where = f"the folder {folder}" + ("" if index is None else f" with the index {index.name}")
        warn_once(f"in {where} these are not read: {', '.join(parts)}")


def _holds_images(folder: Path) -> bool:
    """Whether there is an image at any depth. What cannot be read, or vanishes meanwhile, holds none."""
    endings = (*ENDINGS, *OTHER_ENDINGS)
    return any(name.lower().endswith(endings) for _, _, names in os.walk(folder) for name in names)


def _refuse_file_twice(images: Sequence[ImageFile], source: str) -> None:
    """Refuse two rows that name one file: the image would count twice. Raises WrongCommand."""
    rows: dict[Path, int] = {}
    for number, image in enumerate(images, 1):
        first = rows.setdefault(image.path, number)
        if first != number:
            raise WrongCommand(
                f"the file {image.name!r} occurs twice, in rows {first} and {number} of {source}; name each image once"
            )


def refuse_twice(rows: Iterable[tuple[str, str | None]], source: str) -> None:
    """Refuse (id, caption) rows in which an id occurs twice. ``source`` names the rows' file in messages.

    Raises:
        WrongCommand: an id occurs twice, with one caption or with two.
    """
    first_rows: dict[str, tuple[int, str | None]] = {}
    for number, (name, caption) in enumerate(rows, 1):
        if name in first_rows:
            first, other = first_rows[name]
            where = f"in rows {first} and {number} of {source}"
            if other != caption:
                raise WrongCommand(f"the id {name!r} has two captions, {other!r} and {caption!r}, {where}; keep one")
            raise WrongCommand(f"the id {name!r} occurs twice, {where}; give each row its own id")
        first_rows[name] = (number, caption)
