"""Grids of images with labels, as PNG files. A file is written whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from ddil_core.support.files import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

DPI = 100  # one dot is one pixel
MARGIN = 12  # pixels, around and between the parts
SIDE = 200  # pixels, for row labels
LINE = 1.35  # line height in font heights
FONT = 10  # points
MOST_ROWS, MOST_COLUMNS = 8, 8
"""The largest overview with a row for each prompt. Larger ones wrap."""
MOST_IMAGES = 256
"""The most images that a wrapped overview shows: 16 × 16."""
SMALLEST, LARGEST = 160, 256
"""The sides in pixels to which a wrapped overview enlarges small images, by a whole factor, and shrinks large ones."""
_NO_ORIGIN = {".png": {"Software": None}, ".pdf": dict.fromkeys(("Creator", "Producer", "CreationDate"))}
"""What a file must not hold about its making, by suffix, so that equal figures are equal bytes."""
MOST_LINES = 6
"""The most lines of a caption in a wrapped overview."""


def image_grid(
    images: NDArray[np.uint8],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    path: Path | str,
    *,
    cell: int = 160,
) -> Path:
    """Draw images in rows and columns with labels, and return the file.

    Args:
        images: uint8 [R, C, H, W, 3].
        row_labels: R labels, wrapped at the left of the rows.
        column_labels: C labels, above the columns.
        path: The file.
        cell: Smaller images are enlarged by a whole factor, to at most this many pixels.

    Raises:
        ValueError: The shapes or the type are others.
        DdilError: The file cannot be written.
    """
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[4] != 3:
        raise ValueError(f"images must be uint8 [R, C, H, W, 3], not {images.dtype} {list(images.shape)}")
    if images.shape[:2] != (len(row_labels), len(column_labels)):
        raise ValueError(f"{list(images.shape[:2])} images do not fit {len(row_labels)} × {len(column_labels)} labels")
    factor = max(1, cell // max(images.shape[2:4]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = images.shape[2:4]

    side = max([SIDE, *(_longest_word(label) + MARGIN for label in row_labels)]) if any(row_labels) else 0
    wide = max([width, *map(_longest_word, column_labels)])
    left = [_wrap(label, side - MARGIN) for label in row_labels]
    top = [_wrap(label, wide) for label in column_labels]
    heights = [max(height, _pixels(label)) for label in left]
    xs = _starts(MARGIN + side, [wide] * len(top))
    ys = _starts(2 * MARGIN + max(map(_pixels, top)), heights)

    canvas = np.full((ys.pop(), xs.pop(), 3), 255, np.uint8)
    for r, c in np.ndindex(len(left), len(top)):
        x, y = xs[c] + (wide - width) // 2, ys[r] + (heights[r] - height) // 2
        canvas[y : y + height, x : x + width] = images[r, c]
    captions = [(x + wide / 2, ys[0] - MARGIN / 2, text, "center", "bottom") for x, text in zip(xs, top, strict=True)]
    captions += [(side, y + tall / 2, text, "right", "center") for y, tall, text in zip(ys, heights, left, strict=True)]
    return save_figure(_annotated(canvas, captions), Path(path), DPI)


def overview(images: NDArray[np.uint8], prompts: Sequence[str], path: Path | str) -> int:
    """Draw the images of prompts, and return how many of them the file shows.

    Few images have a row for each prompt and keep their pixels. More images wrap: they stand side by side with their
    captions below them, at most ``MOST_IMAGES`` of them.

    Args:
        images: uint8 [P, N, H, W, 3], N images for each prompt.
        prompts: The P prompts.
        path: The file.

    Raises:
        DdilError: The file cannot be written.
    """
    rows, columns = images.shape[:2]
    if rows <= MOST_ROWS and columns <= MOST_COLUMNS:
        image_grid(images, prompts, [f"no. {number}" for number in range(columns)], path)
        return rows * columns
    captions = [prompt if number == 0 else f"no. {number}" for prompt in prompts for number in range(columns)]
    shown = images.reshape(-1, *images.shape[2:])[:MOST_IMAGES]
    _image_sheet(shown, captions[: len(shown)], Path(path))
    return len(shown)


def _image_sheet(images: NDArray[np.uint8], captions: Sequence[str], path: Path) -> None:
    """Draw images [M, H, W, 3] in rows, about as many rows as columns, each with its caption below it."""
    images = np.stack([_sized(image) for image in images])
    height, width = images.shape[1:3]
    wide = max(width, SMALLEST)
    columns = math.ceil(math.sqrt(len(images)))
    labels = [_shortened(_wrap(caption, wide)) for caption in captions]
    lines = [max(map(_pixels, labels[start : start + columns])) for start in range(0, len(labels), columns)]
    xs, ys = _starts(MARGIN, [wide] * columns), _starts(MARGIN, [height + MARGIN // 2 + below for below in lines])
    canvas = np.full((ys.pop(), xs.pop(), 3), 255, np.uint8)
    texts = []
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = xs[place % columns], ys[place // columns]
        left = x + (wide - width) // 2
        canvas[y : y + height, left : left + width] = image
        texts.append((x + wide / 2, y + height + MARGIN / 2, label, "center", "top"))
    save_figure(_annotated(canvas, texts), path, DPI)


def _sized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarge a small image by a whole factor, or shrink a large one."""
    height, width = image.shape[:2]
    if max(height, width) > LARGEST:
        scale = LARGEST / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    factor = max(1, SMALLEST // max(height, width))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _shortened(label: str) -> str:
    """Cut a label after ``MOST_LINES`` lines."""
    lines = label.split("\n")
    return label if len(lines) <= MOST_LINES else "\n".join([*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + " …"])


def _starts(first: int, sizes: Sequence[int]) -> list[int]:
    """Return where parts of these sizes start, with margins between them, and where a further part would start."""
    return [first + sum(sizes[:i]) + i * MARGIN for i in range(len(sizes) + 1)]


def _annotated(canvas: NDArray[np.uint8], captions: Sequence[tuple[float, float, str, str, str]]) -> Figure:
    """Return a figure of the unchanged pixels, with text at (x, y) pixels from the upper left."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas, origin="upper")
    for x, y, text, ha, va in captions:
        figure.text(x / width, 1 - y / height, text, ha=ha, va=va, fontsize=FONT, linespacing=LINE, parse_math=False)
    return figure


def _wrap(text: str, width: int) -> str:
    """Break text between words into lines of at most `width` pixels. A longer word gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


@lru_cache(maxsize=10_000)
def _width(text: str) -> float:
    """Return the width of drawn text in pixels."""
    return _renderer().get_text_width_height_descent(text, FontProperties(size=FONT), False)[0]


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def _longest_word(text: str) -> int:
    return max((int(np.ceil(_width(word))) for word in text.split()), default=0)


def _pixels(text: str) -> int:
    """Return the height of wrapped text in pixels."""
    return int(np.ceil((text.count("\n") + 1) * FONT * LINE * DPI / 72))


def save_figure(figure: Figure, path: Path, dpi: int) -> Path:
    """Write a figure whole or not at all, and return the file. Equal figures give equal bytes."""
    with replacing(path) as temporary:
        FigureCanvasAgg(figure)  # draws without a display
        with rc_context({"pdf.fonttype": 42}):  # TrueType, which publishers ask for
            figure.savefig(temporary, dpi=dpi, metadata=_NO_ORIGIN.get(path.suffix))
    return path
