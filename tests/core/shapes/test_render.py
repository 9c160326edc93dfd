"""The renderer: exact areas, antialiased edges, the same bytes, fast enough."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ddil_core.shapes.render import background, coverage, polygon, render, signed_distance
from ddil_core.shapes.scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, Meaning, Scene, Thing, draw_scene

CENTRE = (31.3, 32.8)


def one(shape: str, size: str = "large", colour: str = "red", ground: str = "white") -> Scene:
    return Scene(Meaning((Thing(size, colour, shape),), None, ground), (CENTRE,), (0.0, 0.0))


def shoelace(vertices: np.ndarray) -> float:
    x, y = vertices.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


@pytest.mark.parametrize("radius", [9.0, 14.0])
def test_coverage_sums_to_the_area(radius: float) -> None:
    areas = {"circle": np.pi, "square": 2.0, "ring": np.pi * (1 - 0.54**2)}
    for shape, area in areas.items():
        _, _, alpha = coverage(shape, radius, CENTRE)
        assert alpha.sum() == pytest.approx(area * radius**2, rel=0.01), shape


@pytest.mark.parametrize("shape", ["triangle", "diamond", "star", "cross"])
def test_polygons_cover_their_area(shape: str) -> None:
    """Corners are rounded over a pixel's width, so that pointed outlines differ a little more."""
    vertices = polygon(shape)
    assert vertices is not None
    _, _, alpha = coverage(shape, 14.0, CENTRE)
    assert alpha.sum() == pytest.approx(shoelace(vertices) * 14.0**2, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_antialiased(shape: str) -> None:
    """Along every outline some pixels lie strictly between the object's colour and the background's, none beyond."""
    _, _, alpha = coverage(shape, 14.0, CENTRE)
    between = (alpha > 0.02) & (alpha < 0.98)
    assert between.sum() > 40
    straight = shape in ("square", "cross", "diamond")  # edges along the pixels' rows, columns or diagonals: few levels
    assert len(np.unique(alpha[between].round(3))) > (3 if straight else 20)
    picture = render(one(shape)).reshape(-1, 3).astype(int)
    ends = np.array([COLOURS["red"], BACKGROUNDS["white"]])
    assert (picture >= ends.min(0)).all() and (picture <= ends.max(0)).all()
    edge = (picture > ends.min(0) + 3).all(1) & (picture < ends.max(0) - 3).all(1)
    assert edge.sum() > 30


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_reach_their_circumscribed_circle_and_no_further(shape: str) -> None:
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    rim = signed_distance(shape, np.cos(angles), np.sin(angles))
    assert rim.min() == pytest.approx(0, abs=5e-3)
    beyond = signed_distance(shape, 1.02 * np.cos(angles), 1.02 * np.sin(angles))
    assert (beyond > 0).all()


def test_polygon_distances_are_distances() -> None:
    """The square's signed distance against its closed form, at random points in and around it."""
    x, y = np.random.default_rng(0).uniform(-1.5, 1.5, (2, 4000))
    half = np.sqrt(0.5)
    dx, dy = np.abs(x) - half, np.abs(y) - half
    expected = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)
    np.testing.assert_allclose(signed_distance("square", x, y), expected, atol=1e-9)


def test_the_background_is_shaded_linearly() -> None:
    shaded = background("grey", (0.08, -0.05)) / 128.0
    plane = np.diff(shaded[..., 0], axis=1), np.diff(shaded[..., 0], axis=0)
    np.testing.assert_allclose(plane[0], 0.08 * 2 / IMAGE_SIZE)
    np.testing.assert_allclose(plane[1], -0.05 * 2 / IMAGE_SIZE)
    assert shaded.mean() == pytest.approx(1.0)


def test_the_same_scene_gives_the_same_bytes() -> None:
    scene = draw_scene(np.random.default_rng(3), "validation")
    picture = render(scene)
    assert (picture.shape, picture.dtype) == ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert render(scene).tobytes() == picture.tobytes()
    assert render(draw_scene(np.random.default_rng(4), "validation")).tobytes() != picture.tobytes()


def test_objects_are_drawn_where_they_lie() -> None:
    picture = render(one("circle", "small", "blue", "black"))
    x, y = (int(c) for c in CENTRE)
    assert tuple(picture[y, x]) == COLOURS["blue"]
    assert tuple(picture[0, 0]) == tuple(picture[y, x + 12]) == BACKGROUNDS["black"]


def test_at_least_500_pictures_a_second() -> None:
    """On one core, by this thread's processor time; the fastest of three takes."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, "validation") for _ in range(200)]
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        for scene in scenes:
            render(scene)
        seconds.append(time.thread_time() - started)
    assert len(scenes) / min(seconds) >= 500


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        signed_distance("blob", np.zeros(1), np.zeros(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_grid_has_the_distances_of_its_points(shape: str) -> None:
    x, y = np.linspace(-1.3, 1.2, 23), np.linspace(-1.1, 1.4, 19)
    points = signed_distance(shape, *(axis.ravel() for axis in np.meshgrid(x, y)))
    assert (signed_distance(shape, x[None], y[:, None]).ravel() == points).all()
