"""Read image files as 8-bit RGB. All images from outside are read here. ``docs/data.md`` states the rules."""

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
"""What Pillow raises for a file that is not an image, or for an image so large that it could fill the memory."""

READER = 2
"""The version of the rules. Raise it when a file gives other pixels than before, so that stored features are computed
again. Version 2 scales 16-bit grey."""

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""The TIFF tag that says which number is white, and the tag's value for files in which white is 0."""

_DEEP_COLOUR = re.compile(r";16[BLN]$")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True)
class Head:
    """What a file says about its image before the pixels are decoded.

    Attributes:
        size: (W, H) in pixels.
        rgb: Whether the image is 8-bit RGB. Any other image is converted.
        grey16: Whether the image is 16-bit grey, which is scaled to 8 bits.
        deep_colour: Whether the image has 16-bit colour. Pillow keeps the upper 8 bits.
        alpha: Whether the image has transparency, which is dropped.
        animated: Whether the image has several frames. Only the first frame is read.
        range_known: Whether it is known which numbers are black and white. It is not known for 32-bit grey.
    """

    size: tuple[int, int]
    rgb: bool
    grey16: bool
    deep_colour: bool
    alpha: bool
    animated: bool
    range_known: bool


def read_head(source: Path | BinaryIO, formats: tuple[str, ...] | None = None) -> Head:
    """Read the head of an image in one of Pillow's ``formats``; None allows all. Raises one of ``BAD_IMAGE``."""
    with Image.open(source, formats=formats) as image:
        return _head(image)


def _head(image: Image.Image) -> Head:
    mode, raw = image.mode, _raw_mode(image)
    # Pillow reads 16-bit grey in PNM files as 32-bit; its older versions do so for PNG too.
    # It reads 12-bit grey in TIFF files as 16-bit and does not scale it.
    grey16 = (mode.startswith("I;16") and not raw.endswith(";12")) or (mode == "I" and image.format in ("PNG", "PPM"))
    deep_colour = not mode.startswith("I") and _DEEP_COLOUR.search(raw) is not None
    return Head(
        size=image.size,
        rgb=mode == "RGB" and not deep_colour,
        grey16=grey16,
        deep_colour=deep_colour,
        alpha=mode in _ALPHA or "transparency" in image.info,
        animated=bool(getattr(image, "is_animated", False)) and image.format != "MPO",  # phones write JPEG as MPO
        range_known=grey16 or not (mode.startswith("I") or mode == "F"),
    )


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name for the way the file stores its pixels; empty where Pillow does not say."""
    tile = getattr(image, "tile", None)
    if not tile:
        return ""
    arguments = tile[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def read_rgb(source: Path | BinaryIO, name: str, formats: tuple[str, ...] | None = None) -> np.ndarray:
    """Read an image as uint8 [H, W, 3].

    16-bit grey is scaled: 65,535 becomes 255. Pillow converts the other modes to RGB. Transparency is dropped, the EXIF
    rotation is not applied, and only the first frame is read.

    Args:
        source: The file.
        name: The image's name in messages.
        formats: The accepted formats, in Pillow's names; None accepts all.

    Raises:
        DdilError: the file is damaged, or it is not known which of its numbers is white.
    """
    try:
        with Image.open(source, formats=formats) as image:
            head = _head(image)
            if head.range_known:
                return _grey16(image) if head.grey16 else _converted(image)
            mode = image.mode
    except BAD_IMAGE as error:
        raise DdilError(f"the image {name} is damaged ({' '.join(str(error).split())})") from error
    raise DdilError(
        f"the image {name} has Pillow's mode {mode!r}, in which it is not known which number is white; "
        "save it with 8 or 16 bits"
    )


def _grey16(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.uint32)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 65_535 - grey  # Pillow inverts 8-bit files of this kind, but not 16-bit ones
    eight = (grey + 128) // 257  # to the nearest: 65,535 = 255 · 257
    return np.repeat(eight.astype(np.uint8)[..., None], 3, axis=2)


def _converted(image: Image.Image) -> np.ndarray:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the colours stay; without this step Pillow warns about each file
    return np.asarray(image.convert("RGB"))
