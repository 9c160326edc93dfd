"""Pictures with captions, wherever they lie: reading them, saying which are bad, and making them training pictures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ddil_core.data.images import BAD_IMAGE, Head, read_head, read_rgb
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.progress import warn

_NAMED = 5


def name_some(names: Sequence[str]) -> str:
    """Some names for a message, with the number of those left out."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file, by the ``id`` that its noise and its rows go by; ``caption`` is None where it has none."""

    id: str
    path: Path
    caption: str | None

    @property
    def name(self) -> str:
        return self.path.name

    def head(self) -> Head:
        """See ``read_head``. Raises FileNotFoundError too."""
        if not self.path.is_file():
            raise FileNotFoundError(self.path)
        return read_head(self.path)

    def read(self) -> np.ndarray:
        """See ``read_image``."""
        return read_image(self.path)


class CaptionedImage(Protocol):
    """A picture that can be read, wherever it lies: what ``ImageFile`` has."""

    @property
    def name(self) -> str: ...

    @property
    def caption(self) -> str | None: ...

    def head(self) -> Head: ...

    def read(self) -> np.ndarray: ...


def read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] of a picture file, read as ``read_rgb`` says.

    Raises:
        DdilError: the file is missing or damaged, or its pixels have no known range.
    """
    if not path.is_file():
        raise DdilError(f"the picture {path} is missing")
    return read_rgb(path, str(path))


@dataclass(frozen=True)
class Survey:
    """What the heads of ``count`` pictures of ``what`` say.

    ``converted`` are those that are not RGB of 8 bits, ``silent`` those without a caption, ``sizes`` [(W, H)] one picture of
    each; ``changed`` counts the pictures by what reading them changes, in words.
    """

    what: str
    count: int
    converted: list[str]
    silent: list[str]
    sizes: dict[tuple[int, int], str]
    changed: Counter[str]

    def warn_of_changes(self) -> None:
        """Warn in one sentence of all that reading the pictures changes; silent where nothing is changed."""
        of = f"of {self.count:,} pictures of {self.what}"
        parts = [f"{number:,} {change}" for change, number in sorted(self.changed.items())]
        if self.converted:
            parts.insert(0, f"{len(self.converted):,} {of} are not RGB and are converted: {name_some(self.converted)}")
        elif parts:
            parts[0] = f"{of}: {parts[0]}"
        if parts:
            warn("; ".join(parts))


def survey(pictures: Iterable[CaptionedImage], what: str) -> Survey:
    """Look at the heads of pictures; the pixels are not decoded.

    Raises:
        DdilError: some are missing, no pictures, or of no known range; the message names them and says how many.
    """
    count, missing, damaged, unscaled, found = 0, [], [], [], Survey(what, 0, [], [], {}, Counter())
    for picture in pictures:
        count += 1
        if not picture.caption:
            found.silent.append(picture.name)
        try:
            head = picture.head()
        except FileNotFoundError:
            missing.append(picture.name)
        except BAD_IMAGE:
            damaged.append(picture.name)
        else:
            found.sizes.setdefault(head.size, picture.name)
            found.changed.update(words for words, holds in _changes(head).items() if holds)
            if not head.range_known:
                unscaled.append(picture.name)
            elif not head.rgb:
                found.converted.append(picture.name)
    refuse_bad(missing, "missing", count, what)
    refuse_bad(damaged, "damaged", count, what)
    refuse_bad(unscaled, "of 32-bit or 12-bit grey, of which it is not known which number is white", count, what)
    return replace(found, count=count)


def _changes(head: Head) -> dict[str, bool]:
    """What reading a picture may change beside its mode, in words, and whether it does."""
    return {
        "of 16-bit grey, scaled to 8 bits": head.grey16,
        "of 16-bit colour, cut to the upper 8 bits": head.deep_colour,
        "with transparency, which is left out": head.alpha,
        "with several frames, of which the first is read": head.animated,
    }


def refuse_bad(names: Sequence[str], fault: str, count: int, what: str, kind: str = "pictures") -> None:
    """Raises DdilError where there are ``names``, of ``count`` pictures in all; the message holds the first few."""
    if names:
        raise DdilError(
            f"{len(names):,} of {count:,} {kind} of {what} are {fault}: {name_some(names)}; fetch or make them again"
        )


def require_training(pictures: Iterable[CaptionedImage], side: int, what: str, cure: str) -> int:
    """Look at pictures that are to be trained on at ``side`` pixels, and warn of what changes them; returns how many there are.

    ``cure`` says how a picture is given a caption.

    Raises:
        WrongCommand: some have no caption.
        DdilError: some are missing or damaged.
    """
    found = survey(pictures, what)
    if found.silent:
        raise WrongCommand(
            f"{len(found.silent):,} of {found.count:,} pictures of {what} have no caption: {name_some(found.silent)}; "
            f"{cure}, or leave them out"
        )
    found.warn_of_changes()
    small = [name for size, name in found.sizes.items() if min(size) < side]
    if small:
        warn(f"pictures of {what} are smaller than {side} x {side} and are enlarged, such as {small[0]}")
    return found.count


def refuse_fewer(there: int, count: int, what: str) -> None:
    """Raises WrongCommand where fewer pictures are there than the ``count`` that are to be encoded."""
    if there == 0:
        raise WrongCommand(f"{what} holds no pictures to train on")
    if there < count:
        raise WrongCommand(
            f"{what} has {there:,} pictures to train on, fewer than the pool of {count:,}; add others, or say --set pool={there}"
        )


def prepare_image(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [side, side, 3]: centre crop to the short edge, then Pillow's Lanczos, which antialiases.

    This is the preparation of the recipe ``gigagan``, so that what is trained on and what is compared with are made alike. A
    picture that is smaller is enlarged; one of this very size stays as it is. An odd rest of the crop is split as torchvision's
    ``center_crop`` splits it.
    """
    short = min(image.shape[:2])
    top, left = (round((length - short) / 2) for length in image.shape[:2])
    square = Image.fromarray(image[top : top + short, left : left + short])
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def prepare_batches(
    pictures: Iterable[CaptionedImage], side: int, batch_size: int, count: int, what: str
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Pictures read and prepared, in batches uint8 [B, side, side, 3] with their captions.

    Raises:
        DdilError: some are damaged. No batch comes after the first of them, and the others are read so that all are named.
    """
    pictures, damaged = iter(pictures), list[str]()
    while part := list(islice(pictures, batch_size)):
        images = []
        for picture in part:
            try:
                images.append(prepare_image(picture.read(), side))
            except DdilError:
                damaged.append(picture.name)
        if not damaged:
            yield np.stack(images), [str(picture.caption) for picture in part]
    refuse_bad(damaged, "damaged", count, what)


def files_sha256(pictures: Sequence[ImageFile]) -> str:
    """A hash of picture files' bytes, in their order."""
    content = hashlib.sha256()
    for picture in pictures:
        with picture.path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()
