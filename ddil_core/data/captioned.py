"""Images with captions, in files or in shards: read them, name the bad ones, and prepare them for training."""

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

from ddil_core.data.base import Side
from ddil_core.data.images import BAD_IMAGE, Head, read_head, read_rgb
from ddil_core.support.checksums import MANIFEST, require_digest
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.progress import warn

CHANGED = f"make or copy the images again; if you changed the file yourself, delete {MANIFEST} beside it"
_NAMED = 5


def name_some(names: Sequence[str]) -> str:
    """Return the first names for a message, and the number of the others."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


@dataclass(frozen=True)
class ImageFile:
    """An image in a file.

    Attributes:
        id: Its noise is drawn from this name.
        path: The file.
        caption: None where the image has none.
        sha256: The file's checksum in the folder's ``sha256.json``; None where it has none.
    """

    id: str
    path: Path
    caption: str | None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def head(self) -> Head:
        """See ``read_head``. Raises FileNotFoundError too."""
        if not self.path.is_file():
            raise FileNotFoundError(self.path)
        return read_head(self.path)

    def read(self) -> np.ndarray:
        """See ``read_image``. Raises DdilError too where the file does not match its checksum."""
        if self.path.is_file():
            require_digest(self.path, self.sha256, "the images", CHANGED)
        return read_image(self.path)


class CaptionedImage(Protocol):
    """An image that can be read, in a file (``ImageFile``) or elsewhere."""

    @property
    def name(self) -> str: ...

    @property
    def caption(self) -> str | None: ...

    def head(self) -> Head: ...

    def read(self) -> np.ndarray: ...


def read_image(path: Path) -> np.ndarray:
    """Read an image file as uint8 [H, W, 3], as ``read_rgb`` does.

    Raises:
        DdilError: the file is missing or damaged, or it is not known which of its numbers is white.
    """
    if not path.is_file():
        raise DdilError(f"the image {path} is missing")
    return read_rgb(path, str(path))


@dataclass(frozen=True)
class Survey:
    """What the heads of images say.

    Attributes:
        what: The name of the images' data set in messages.
        count: The number of images.
        converted: The names of images that are not 8-bit RGB.
        uncaptioned: The names of images without a caption.
        sizes: One image's name for each size (W, H).
        changed: The number of images for each change that reading makes, by its description.
    """

    what: str
    count: int
    converted: list[str]
    uncaptioned: list[str]
    sizes: dict[tuple[int, int], str]
    changed: Counter[str]

    def warn_of_changes(self) -> None:
        """Warn in one sentence of the changes that reading makes; print nothing where it makes none."""
        of = f"of {self.count:,} images of {self.what}"
        parts = [f"{number:,} {change}" for change, number in sorted(self.changed.items())]
        if self.converted:
            parts.insert(0, f"{len(self.converted):,} {of} are not RGB and are converted: {name_some(self.converted)}")
        elif parts:
            parts[0] = f"{of}: {parts[0]}"
        if parts:
            warn("; ".join(parts))


def survey(images: Iterable[CaptionedImage], what: str) -> Survey:
    """Read the heads of images, and no pixels. ``what`` names their data set in messages.

    Raises:
        DdilError: images are missing, damaged or of an unknown range; the message counts them and names some.
    """
    count, missing, damaged, unscaled = 0, list[str](), list[str](), list[str]()
    result = Survey(what, 0, [], [], {}, Counter())
    for image in images:
        count += 1
        if not image.caption:
            result.uncaptioned.append(image.name)
        try:
            head = image.head()
        except FileNotFoundError:
            missing.append(image.name)
        except BAD_IMAGE:
            damaged.append(image.name)
        else:
            result.sizes.setdefault(head.size, image.name)
            result.changed.update(change for change, holds in _changes(head).items() if holds)
            if not head.range_known:
                unscaled.append(image.name)
            elif not head.rgb:
                result.converted.append(image.name)
    refuse_bad(missing, "missing", count, what)
    refuse_bad(damaged, "damaged", count, what)
    refuse_bad(unscaled, "32-bit or 12-bit grey, in which it is not known which number is white", count, what)
    return replace(result, count=count)


def _changes(head: Head) -> dict[str, bool]:
    """Return the changes that reading an image may make, other than conversion to RGB, and whether it makes each."""
    return {
        "of 16-bit grey, scaled to 8 bits": head.grey16,
        "of 16-bit colour, cut to the upper 8 bits": head.deep_colour,
        "with transparency, which is dropped": head.alpha,
        "with several frames, of which the first is read": head.animated,
    }


def refuse_bad(names: Sequence[str], fault: str, count: int, what: str, kind: str = "images") -> None:
    """Refuse to go on where there are bad images.

    Args:
        names: The names of the bad images.
        fault: What is wrong with them.
        count: The number of all images.
        what: The name of their data set in messages.
        kind: A word for the images in messages.

    Raises:
        DdilError: ``names`` is not empty; the message holds the first names.
    """
    if names:
        raise DdilError(
            f"{len(names):,} of {count:,} {kind} of {what} are {fault}: {name_some(names)}; fetch or make them again"
        )


def require_training(images: Iterable[CaptionedImage], side: Side, what: str, cure: str) -> int:
    """Check images for training at a size, warn of the changes to them, and return their number.

    ``what`` names their data set in messages, and ``cure`` says how the user gives an image a caption.

    Raises:
        WrongCommand: images have no caption.
        DdilError: images are missing or damaged.
    """
    result = survey(images, what)
    if result.uncaptioned:
        raise WrongCommand(
            f"{len(result.uncaptioned):,} of {result.count:,} images of {what} have no caption: "
            f"{name_some(result.uncaptioned)}; {cure}, or leave them out"
        )
    result.warn_of_changes()
    height, width = (side, side) if isinstance(side, int) else side
    small = [name for size, name in result.sizes.items() if size[0] < width or size[1] < height]
    if small:
        warn(f"images of {what} are smaller than {height} x {width} and are enlarged, such as {small[0]}")
    return result.count


def refuse_fewer(available: int, count: int, what: str) -> None:
    """Raise WrongCommand where the data set ``what`` has fewer training images than the pool's ``count``."""
    if available == 0:
        raise WrongCommand(f"{what} holds no images to train on")
    if available < count:
        raise WrongCommand(
            f"{what} has {available:,} images to train on, fewer than the pool of {count:,}; "
            f"add others, or say --set pool={available}"
        )


def prepare_image(image: np.ndarray, side: Side) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [h, w, 3]: crop the largest centre of the size's shape, then resize by Pillow's Lanczos.

    The recipe ``gigagan`` prepares images in the same way, so training and evaluation images match. Smaller images are
    enlarged; an image of this size stays as it is. An odd border is split as torchvision's ``center_crop`` splits it.
    """
    height, width = (side, side) if isinstance(side, int) else side
    tall, wide = image.shape[:2]
    if tall * width > wide * height:
        tall = max(1, round(wide * height / width))
    else:
        wide = max(1, round(tall * width / height))
    top, left = round((image.shape[0] - tall) / 2), round((image.shape[1] - wide) / 2)
    centre = Image.fromarray(image[top : top + tall, left : left + wide])
    return np.asarray(centre.resize((width, height), Image.Resampling.LANCZOS))


def prepare_batches(
    images: Iterable[CaptionedImage], side: Side, batch_size: int, count: int, what: str
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Read and prepare images, and yield batches uint8 [B, H, W, 3] with their captions.

    Args:
        images: The images, in the order of training.
        side: The side in pixels of the prepared images, or their (height, width).
        batch_size: The number of images in a batch; the last batch may be smaller.
        count: The number of images that a message states.
        what: The name of their data set in messages.

    Raises:
        DdilError: images are damaged. The first of them ends the batches; the others are read so that all are named.
    """
    remaining, damaged = iter(images), list[str]()
    while part := list(islice(remaining, batch_size)):
        prepared = []
        for image in part:
            try:
                prepared.append(prepare_image(image.read(), side))
            except DdilError:
                damaged.append(image.name)
        if not damaged:
            yield np.stack(prepared), [str(image.caption) for image in part]
    refuse_bad(damaged, "damaged", count, what)


def files_sha256(images: Sequence[ImageFile]) -> str:
    """Return a hash of image files' bytes, in their order."""
    content = hashlib.sha256()
    for image in images:
        with image.path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()
