"""Render scenes as antialiased images from signed distances: more than 500 images a second on one core."""

from __future__ import annotations

from functools import cache

import numpy as np

from ddil_core.shapes.scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, SIZES, Scene


def polygon(shape: str) -> np.ndarray | None:
    """Return the vertices [n, 2] of a shape with circumscribed radius 1 (y down); None for a round shape."""
    if shape == "square":
        return _regular(4, np.pi / 4)
    if shape == "triangle":
        return _regular(3, -np.pi / 2)
    if shape == "diamond":
        return np.array([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)])
    if shape == "star":
        corners = _regular(10, -np.pi / 2)
        return corners * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]
    if shape == "cross":
        a, b = 0.30, 0.954  # half width and half length of an arm; a² + b² = 1
        return np.array(
            [(a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a), (-a, b), (a, b)]
        )
    return None


def _regular(n: int, start: float) -> np.ndarray:
    angles = start + 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@cache
def _edges(shape: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the vertices and the edges from them, [n, 2] each; None for a round shape."""
    vertices = polygon(shape)
    return None if vertices is None else (vertices, np.roll(vertices, -1, axis=0) - vertices)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance, negative inside, of points (x, y) from a shape with circumscribed radius 1.

    ``x`` and ``y`` broadcast. A grid of x [1, w] and y [h, 1] costs half of its points x [h, w] and y [h, w].
    """
    edges = _edges(shape)
    if edges is not None:
        return _polygon_distance(x, y, *edges)
    rho = np.hypot(x, y)
    if shape == "circle":
        return rho - 1.0
    if shape == "ring":
        return np.abs(rho - 0.77) - 0.23
    if shape == "moon":
        return np.maximum(rho - 1.0, 0.78 - np.hypot(x - 0.48, y))
    raise ValueError(f"unknown shape {shape!r}")


def _polygon_distance(x: np.ndarray, y: np.ndarray, vertices: np.ndarray, edges: np.ndarray) -> np.ndarray:
    per_edge = (len(vertices), *(1,) * np.ndim(x))
    (vx, vy), (ex, ey) = ((values.T.reshape(2, *per_edge)) for values in (vertices, edges))
    px, py = x - vx, y - vy
    along = px * ex + py * ey
    along /= ex * ex + ey * ey
    np.clip(along, 0.0, 1.0, out=along)
    squared = (np.square(px - along * ex) + np.square(py - along * ey)).min(axis=0)
    # A point is inside where the ray to its right crosses an odd number of edges.
    side = ex * py - ey * px
    up, down = (py >= 0) & (py < ey), (py < 0) & (py >= ey)
    inside = np.logical_xor.reduce((up & (side > 0)) | (down & (side < 0)), axis=0)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared)


def coverage(shape: str, radius: float, centre: tuple[float, float]) -> tuple[slice, slice, np.ndarray]:
    """Return an object's bounding box (rows, columns) and the covered share of each pixel in it, [h, w] in [0, 1]."""
    low = [max(0, int(c - radius - 1)) for c in centre]
    high = [min(IMAGE_SIZE, int(c + radius + 2)) for c in centre]
    x, y = ((np.arange(a, b) + 0.5 - c) / radius for a, b, c in zip(low, high, centre, strict=True))
    alpha = np.clip(0.5 - radius * signed_distance(shape, x[None], y[:, None]), 0.0, 1.0)
    return slice(low[1], high[1]), slice(low[0], high[0]), alpha


_CENTRED = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1


def background(name: str, shading: tuple[float, float]) -> np.ndarray:
    """Return a shaded background, float [H, W, 3] in [0, 255]."""
    brightness = 1.0 + shading[0] * _CENTRED + shading[1] * _CENTRED[:, None]
    return brightness[..., None] * np.array(BACKGROUNDS[name], dtype=np.float64)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene as uint8 [H, W, 3]."""
    image = background(scene.meaning.background, scene.shading)
    for thing, centre in zip(scene.meaning.things, scene.centres, strict=True):
        rows, columns, alpha = coverage(thing.shape, SIZES[thing.size], centre)
        patch = image[rows, columns]
        patch += alpha[..., None] * (np.array(COLOURS[thing.colour]) - patch)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
