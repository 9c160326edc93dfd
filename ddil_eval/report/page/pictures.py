"""Pictures from a results folder: read, made small, and written into the page as data.

Files are pixels from anywhere: one that Pillow does not read, that is very large, or that does not match its checksum
is left out and counted.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ddil_core.support.checksums import MANIFEST, Damaged, read_manifest, require_digest

MOST_PIXELS = 40_000_000
"""The most pixels of a file that is read."""
SMALL = 128 * 128
"""An image of at most this many pixels is kept without loss."""


@dataclass(frozen=True)
class Picture:
    """An image in the page: its data URI, its size in pixels, and its text for those who do not see it."""

    source: str
    width: int
    height: int
    alt: str


def read_image(path: Path) -> Image.Image | None:
    """Return an RGB image; None for a file that cannot be read, is too large, or does not match its checksum."""
    try:
        manifest = path.parent / MANIFEST
        if manifest.is_file():
            digests = _digests(path.parent, manifest.stat().st_mtime_ns)
            require_digest(path, digests.get(path.name), "the images", "make them again")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    return None
                return opened.convert("RGB")
    except (Damaged, OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None


@lru_cache(maxsize=8)
def _digests(folder: Path, modified: int) -> dict[str, str]:
    """Return the checksums in a folder, read once for all of its images. ``modified`` is the time of the file."""
    return read_manifest(folder, "the images", "make them again") or {}


def embed(image: Image.Image, alt: str, side: int) -> Picture:
    """Return an image as WebP, made smaller where its longer side exceeds ``side`` pixels.

    Small images and drawings keep each pixel; a large one with many colours loses what is not seen.
    """
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    lossless = image.width * image.height <= SMALL
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=lossless, quality=100 if lossless else 82, method=4)
    source = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return Picture(source, image.width, image.height, alt)


def split(strip: Image.Image, columns: int) -> Sequence[Image.Image] | None:
    """Return the images of a strip from left to right; None if its width is not that of ``columns`` images."""
    width = strip.width // columns
    if width == 0 or width * columns != strip.width:
        return None
    return [strip.crop((place * width, 0, (place + 1) * width, strip.height)) for place in range(columns)]
