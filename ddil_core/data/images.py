"""Image files to RGB of 8 bits: the one reader of every picture that comes from outside. ``docs/data.md`` states the rules."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ddil_core.support.errors import DdilError

BAD_IMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises of a file that is no picture, or one so large that opening it could take all memory."""

READER = 2
"""Raised whenever the same file gives other pixels, so that what was kept of the old ones is not read: 2 scales 16-bit grey."""

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""The tag of a TIFF that says which end of its numbers is white, and the value for which it is 0."""

_DEEP_COLOUR = re.compile(r";16[BLN]$")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True)
class Head:
    """What a picture's file says of it before its pixels are decoded, and so what reading it changes.

    Attributes:
        size: (W, H) in pixels.
        rgb: whether it is RGB of 8 bits; what is not is converted.
        grey16: whether it is grey of 16 bits, which is scaled to 8.
        deep_colour: whether it is colour of 16 bits, of which Pillow keeps the upper 8.
        alpha: whether it has transparency, which is left out.
        animated: whether it has several frames, of which the first is read.
        range_known: whether it is known which numbers are black and white; grey of 32 bits may hold any.
    """

    size: tuple[int, int]
    rgb: bool
    grey16: bool
    deep_colour: bool
    alpha: bool
    animated: bool
    range_known: bool


def read_head(source: Path | BinaryIO, formats: tuple[str, ...] | None = None) -> Head:
    """The head of a picture in one of Pillow's ``formats``. Raises one of ``BAD_IMAGE``."""
    with Image.open(source, formats=formats) as image:
        return _head(image)


def _head(image: Image.Image) -> Head:
    mode, raw = image.mode, _raw_mode(image)
    # Pillow reads 16-bit grey of PNM, and its older versions that of PNG, as 32-bit; TIFF's 12-bit grey as 16-bit, unscaled.
    grey16 = (mode.startswith("I;16") and not raw.endswith(";12")) or (mode == "I" and image.format in ("PNG", "PPM"))
    deep_colour = not mode.startswith("I") and _DEEP_COLOUR.search(raw) is not None
    return Head(
        size=image.size,
        rgb=mode == "RGB" and not deep_colour,
        grey16=grey16,
        deep_colour=deep_colour,
        alpha=mode in _ALPHA or "transparency" in image.info,
        animated=bool(getattr(image, "is_animated", False)) and image.format != "MPO",  # MPO is what phones call a JPEG
        range_known=grey16 or not (mode.startswith("I") or mode == "F"),
    )


def _raw_mode(image: Image.Image) -> str:
    """How the file stores its pixels, in Pillow's names; empty where Pillow does not say."""
    tile = getattr(image, "tile", None)
    if not tile:
        return ""
    arguments = tile[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def read_rgb(source: Path | BinaryIO, name: str, formats: tuple[str, ...] | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of a picture in one of Pillow's ``formats``; ``name`` is what messages call it.

    16-bit grey is scaled: 65,535 becomes 255. Other modes are converted to RGB as Pillow does. Transparency is left out, the
    EXIF rotation is not applied, and of several frames the first is read.

    Raises:
        DdilError: the file is damaged, or its pixels have no known range.
    """
    try:
        with Image.open(source, formats=formats) as image:
            head = _head(image)
            if head.range_known:
                return _grey16(image) if head.grey16 else _converted(image)
            mode = image.mode
    except BAD_IMAGE as error:
        raise DdilError(f"the picture {name} is damaged ({' '.join(str(error).split())})") from error
    raise DdilError(
        f"the picture {name} has numbers of Pillow's mode {mode!r}, and which of them is white is not known; "
        "save it with 8 or 16 bits"
    )


def _grey16(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.uint32)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 65_535 - grey  # Pillow turns such a TIFF of 8 bits itself, and leaves one of 16 bits as it is
    eight = (grey + 128) // 257  # to the nearest: 65,535 = 255 · 257
    return np.repeat(eight.astype(np.uint8)[..., None], 3, axis=2)


def _converted(image: Image.Image) -> np.ndarray:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; without this step Pillow warns of each file
    return np.asarray(image.convert("RGB"))
