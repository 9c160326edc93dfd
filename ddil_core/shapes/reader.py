"""Read what an image of the shapes world shows, by analysis and synthesis.

The reader uses the image alone. It fits the shaded background and separates the objects from it. For each object it
finds the colour, shape, size and place with the nearest rendering. It does not guess: an image with a mixed colour, a
blurred or broken outline, a ghost or a third object is unreadable and counts as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from ddil_core.shapes.render import background, coverage
from ddil_core.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Meaning,
    Thing,
    relation_of,
)

Point = tuple[float, float]
"""x and y in pixels, y down."""

BACKGROUND_TOLERANCE = 26.0
"""Largest distance of a background pixel from its colour's brightness line (of 255, Euclidean)."""
CONTRAST = 44.0
"""Smallest distance of an object's pixel from the background (of 255, Euclidean)."""
COLOUR_TOLERANCE = 45.0
"""Largest distance of an object's median colour from its palette colour (of 255, Euclidean).

It is less than half the distance of the two nearest colours, blue and purple. It is also less than the distance of
purple from the middle between red and blue.
"""
OUTLINE_TOLERANCE = 4.0
"""Largest error of coverage, Σ|α − α̂| / √area, in pixels; √area grows as the outline's length does.

On 384 autoencoder round trips the median was 1.5 and the 99th percentile 3.0.
"""
DAMAGE_TOLERANCE = 12.0
"""Largest Σ|α − α̂| in a window of 5 × 5 pixels, about half the window: a long outline must not hide a bite.

On 384 autoencoder round trips the 99th percentile was 5.9. A bite of 4 × 4 pixels gives 16.
"""
DOUBT = 1.5
"""Outline error above which the reader also tries other shapes at sizes that no object has.

A square between the two sizes covers nearly the same pixels as a small circle. On 100 autoencoder round trips the
error of every other shape was at least 0.95 of this error.
"""
GHOST_AREA = 4.0
"""Number of pixels outside the objects that may differ from the background."""

ATTRIBUTES = ("count", "shape", "colour", "size", "relation", "background")


@dataclass(frozen=True)
class Reading:
    """What an image shows.

    Attributes:
        things: The objects.
        centres: The objects' centres (x, y) in pixels, y down.
        background: The background's colour; None where no colour fits.
        unreadable: The attribute at which reading failed; None where the image is readable.
    """

    things: tuple[Thing, ...] = ()
    centres: tuple[tuple[float, float], ...] = ()
    background: str | None = None
    unreadable: str | None = None


def read(image: np.ndarray) -> Reading:
    """Read one image, uint8 [64, 64, 3]."""
    pixels = image.astype(np.float64)
    name, empty = _fit_background(pixels)
    if name is None:
        return Reading(unreadable="background")
    difference = pixels - empty
    labels, count = ndimage.label(np.sqrt((difference**2).sum(-1)) > CONTRAST, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    objects = [label + 1 for label in range(count) if areas[label] > GHOST_AREA]
    if len(objects) not in (1, 2) or areas.sum() - areas[[label - 1 for label in objects]].sum() > GHOST_AREA:
        return Reading(background=name, unreadable="count")
    owner = _nearest_label(labels, objects)
    things, centres = [], []
    for label in objects:
        colour, alpha = _fit_colour(pixels, empty, labels == label, owner == label)
        if colour is None:
            return Reading(background=name, unreadable="colour")
        shape, size, centre, error = _fit_shape(alpha)
        if error > OUTLINE_TOLERANCE or _damage(alpha, shape, SIZES[size], centre) > DAMAGE_TOLERANCE:
            return Reading(background=name, unreadable="shape")
        things.append(Thing(size, colour, shape))
        centres.append(centre)
    return Reading(tuple(things), tuple(centres), name)


def drawn_right(reading: Reading, meaning: Meaning) -> dict[str, bool]:
    """Return for each attribute whether an image shows what a caption says; ``exact`` is True where all are right.

    Objects are matched in the order that gets most attributes right. In an unreadable image only the background can be
    right.
    """
    right = dict.fromkeys(ATTRIBUTES, False)
    right["background"] = reading.background == meaning.background
    if reading.unreadable is None and len(reading.things) == len(meaning.things):
        orders = [_compare(reading, meaning, order) for order in permutations(range(len(meaning.things)))]
        right |= max(orders, key=lambda attributes: sum(attributes.values())) | {"count": True}
    return right | {"exact": all(right.values())}


def _compare(reading: Reading, meaning: Meaning, order: tuple[int, ...]) -> dict[str, bool]:
    things = [reading.things[index] for index in order]
    centres = [reading.centres[index] for index in order]
    right = {
        attribute: all(
            getattr(a, attribute) == getattr(b, attribute) for a, b in zip(things, meaning.things, strict=True)
        )
        for attribute in ("shape", "colour", "size")
    }
    right["relation"] = meaning.relation is None or relation_of(centres[0], centres[1]) == meaning.relation
    return right


_CENTRED = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
_PLANE = np.stack(
    [np.ones((IMAGE_SIZE, IMAGE_SIZE)), *np.meshgrid(_CENTRED, _CENTRED)],
    axis=-1,
)


def _fit_background(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Return the background colour that fits most pixels, and its shaded image; None where it fits less than half."""
    best, best_name, best_mask = 0.5, None, None
    for name, rgb in BACKGROUNDS.items():
        colour = np.array(rgb, dtype=np.float64)
        brightness = np.clip(pixels @ colour / (colour @ colour), 0.75, 1.25)
        mask = np.linalg.norm(pixels - brightness[..., None] * colour, axis=-1) < BACKGROUND_TOLERANCE
        if mask.mean() > best:
            best, best_name, best_mask = mask.mean(), name, mask
    if best_name is None or best_mask is None:
        return None, np.zeros_like(pixels)
    colour = np.array(BACKGROUNDS[best_name], dtype=np.float64)
    brightness = pixels @ colour / (colour @ colour)
    plane, *_ = np.linalg.lstsq(_PLANE[best_mask], brightness[best_mask], rcond=None)
    if abs(plane[0] - 1) > 0.25:
        return None, np.zeros_like(pixels)
    return best_name, plane[0] * background(best_name, (plane[1] / plane[0], plane[2] / plane[0]))


def _nearest_label(labels: np.ndarray, objects: list[int]) -> np.ndarray:
    """Return the label of the nearest object for each pixel."""
    if len(objects) == 1:
        return np.full_like(labels, objects[0])
    nearest = ndimage.distance_transform_edt(~np.isin(labels, objects), return_distances=False, return_indices=True)
    return labels[tuple(nearest)]


def _fit_colour(
    pixels: np.ndarray, empty: np.ndarray, mask: np.ndarray, nearest: np.ndarray
) -> tuple[str | None, np.ndarray]:
    """Return an object's palette colour, from its inner pixels, and its coverage α of each pixel.

    ``empty`` is the background alone, ``mask`` the object's pixels, and ``nearest`` the pixels nearest to the object.
    """
    depth = ndimage.distance_transform_edt(mask)
    inner = depth >= min(2.0, depth.max())
    median = np.median(pixels[inner], axis=0)
    name, distance = min(
        ((n, float(np.linalg.norm(median - rgb))) for n, rgb in COLOURS.items()), key=lambda pair: pair[1]
    )
    if distance > COLOUR_TOLERANCE:
        return None, np.zeros(mask.shape)
    contrast = median - empty
    alpha = ((pixels - empty) * contrast).sum(-1) / (contrast**2).sum(-1)
    return name, np.where(nearest, np.clip(alpha, 0.0, 1.0), 0.0) * ndimage.binary_dilation(mask, iterations=2)


@cache
def _moments(shape: str, radius: float) -> tuple[float, float, float]:
    """Return the area of a shape's rendering, and the offset (x, y) of the centroid from the centre."""
    middle = IMAGE_SIZE / 2
    rows, columns, alpha = coverage(shape, radius, (middle, middle))
    area = float(alpha.sum())
    x = (alpha.sum(0) @ (np.arange(columns.start, columns.stop) + 0.5)) / area - middle
    y = (alpha.sum(1) @ (np.arange(rows.start, rows.stop) + 0.5)) / area - middle
    return area, float(x), float(y)


def _fit_shape(alpha: np.ndarray) -> tuple[str, str, Point, float]:
    """Return the shape, size and centre with the coverage nearest to ``alpha``, and the remaining outline error."""
    area, x, y = _centroid(alpha)
    candidates = []
    for shape in SHAPES:
        for size, radius in SIZES.items():
            expected, dx, dy = _moments(shape, radius)
            if 0.6 < area / expected < 1.6:
                centre = (x - dx, y - dy)
                candidates.append((_outline_error(alpha, shape, radius, centre), shape, size, centre))
    if not candidates:
        return "", "", (x, y), np.inf
    nearest = sorted(candidates, key=lambda candidate: candidate[0])[:3]
    refined = [
        (*_refine(alpha, shape, SIZES[size], centre, error), shape, size) for error, shape, size, centre in nearest
    ]
    error, centre, shape, size = min(refined, key=lambda item: item[0])
    if error > DOUBT and _is_another(alpha, shape, error * np.sqrt(_moments(shape, SIZES[size])[0])):
        return "", "", centre, np.inf
    return shape, size, centre, error


def _centroid(alpha: np.ndarray) -> tuple[float, float, float]:
    """Return the area and the centroid (x, y)."""
    area = float(alpha.sum())
    places = np.arange(IMAGE_SIZE) + 0.5
    return area, float(alpha.sum(0) @ places) / area, float(alpha.sum(1) @ places) / area


def _is_another(alpha: np.ndarray, shape: str, uncovered: float) -> bool:
    """Whether another shape with the area of ``alpha`` has less than half the error ``uncovered``, Σ|α − α̂|."""
    area, x, y = _centroid(alpha)
    radius = SIZES["large"]
    for other in SHAPES:
        expected, dx, dy = _moments(other, radius)
        scale = float(np.sqrt(area / expected))
        centre = (x - scale * dx, y - scale * dy)
        if other != shape and _uncovered(alpha, other, scale * radius, centre) < 0.5 * uncovered:
            return True
    return False


def _refine(alpha: np.ndarray, shape: str, radius: float, centre: Point, error: float) -> tuple[float, Point]:
    """Improve the centre by a pattern search with a halving step; return the error and the centre."""
    step = 0.6
    for _ in range(4):
        for dx, dy in ((-step, 0.0), (step, 0.0), (0.0, -step), (0.0, step)):
            trial = (centre[0] + dx, centre[1] + dy)
            trial_error = _outline_error(alpha, shape, radius, trial)
            if trial_error < error:
                error, centre = trial_error, trial
        step /= 2
    return error, centre


def _outline_error(alpha: np.ndarray, shape: str, radius: float, centre: Point) -> float:
    return _uncovered(alpha, shape, radius, centre) / float(np.sqrt(_moments(shape, radius)[0]))


def _damage(alpha: np.ndarray, shape: str, radius: float, centre: Point) -> float:
    """Return the largest Σ|α − α̂| in a window of 5 × 5 pixels."""
    rows, columns, expected = coverage(shape, radius, centre)
    remaining = alpha.copy()
    remaining[rows, columns] -= expected
    return 25.0 * float(ndimage.uniform_filter(np.abs(remaining), 5, mode="constant").max())


def _uncovered(alpha: np.ndarray, shape: str, radius: float, centre: Point) -> float:
    """Return Σ|α − α̂| over the image."""
    rows, columns, expected = coverage(shape, radius, centre)
    box = alpha[rows, columns]
    return float(np.abs(box - expected).sum() + alpha.sum() - box.sum())
