"""Networks for images of the shapes world: the reader, which finds what an image shows, and the two-tower scorer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ddil_core.shapes import reader, scorer
from ddil_core.shapes.scene import IMAGE_SIZE, Meaning, parse_caption
from ddil_core.support.errors import WrongCommand
from ddil_eval.metrics.metric import Extractor, Network

COLUMNS = (*reader.ATTRIBUTES, "exact")


def parse_captions(metric: str, images: np.ndarray, captions: list[str]) -> list[Meaning]:
    """Return what the captions say, after checking that the images [B, 64, 64, 3] can be of the shapes world.

    Raises:
        WrongCommand: the images have another size or type, a caption is not of the shapes world, or the numbers of
            images and captions differ.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or len(images) != len(captions):
        raise WrongCommand(
            f"{metric} measures images of the shapes world, uint8 [{len(captions)}, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], "
            f"not {images.dtype} {list(images.shape)}; leave the metric out for other models"
        )
    try:
        return [parse_caption(caption) for caption in captions]
    except ValueError as error:
        raise WrongCommand(f"{metric} cannot be measured: {error}") from error


def require_shapes(metric: str, size: tuple[int, int], captions: Sequence[str]) -> None:
    """Refuse images of this size (H, W) with these captions where they cannot be of the shapes world.

    Raises:
        WrongCommand: they cannot.
    """
    images = np.broadcast_to(np.uint8(0), (len(captions), *size, 3))  # takes no memory
    parse_captions(metric, images, list(captions))


def attributes_right(images: np.ndarray, captions: list[str]) -> np.ndarray:
    """Return for each image whether each of ``COLUMNS`` is as the caption says: bool [B, columns].

    What the reader cannot read counts as wrong. ``images`` are uint8 [B, 64, 64, 3].

    Raises:
        WrongCommand: an image or a caption is not of the shapes world.
    """
    meanings = parse_captions("drawn_right", images, captions)
    rows = [reader.drawn_right(reader.read(image), meaning) for image, meaning in zip(images, meanings, strict=True)]
    return np.array([[row[column] for column in COLUMNS] for row in rows], dtype=bool).reshape(len(rows), len(COLUMNS))


def open_reader(device: str) -> Extractor:
    """Return the extractor of "exact": 1.0 for an image that shows exactly its caption, else 0.0."""
    return lambda images, captions: attributes_right(images, captions)[:, -1:].astype(np.float64)


def open_scorer(device: str) -> Extractor:
    """Load the two-tower scorer. Its features are cosines between image and caption, float32 in [-1, 1]."""
    model, preprocess, tokenize = scorer.load_scorer(scorer.WEIGHTS, device)

    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        parse_captions("clip_score_shapes", images, captions)
        return scorer.cosine(model, preprocess(images), tokenize(captions))

    return extract


SHAPES_READER = Network(
    name="drawn_right",
    needs="nothing: the reader is part of the shapes world",
    open_on=open_reader,
    reads_captions=True,
    shapes_only=True,
    require=partial(require_shapes, "drawn_right"),
)
SHAPES_SCORER = Network(
    name="clip_score_shapes",
    needs="the two-tower scorer shipped with the shapes world, open_clip and torchvision",
    open_on=open_scorer,
    lacks=lambda: scorer.missing(scorer.WEIGHTS),
    reads_captions=True,
    shapes_only=True,
    require=partial(require_shapes, "clip_score_shapes"),
)
