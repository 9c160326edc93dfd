"""The reader: right on what is drawn right, and silent on what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ddil_core.data.shapes import ShapesData
from ddil_core.shapes import scene as world
from ddil_core.shapes.reader import ATTRIBUTES, COLOUR_TOLERANCE, Reading, drawn_right, read
from ddil_core.shapes.render import coverage, render
from ddil_core.shapes.scene import COLOURS, SIZES, Meaning, Scene, Thing, draw_scene

STAR = Thing("large", "blue", "star")
CIRCLE = Thing("small", "red", "circle")
MEANING = Meaning((CIRCLE, STAR), "left of", "grey")
SCENE = Scene(MEANING, ((14.0, 30.0), (45.0, 34.0)), (0.02, -0.03))


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return render(SCENE)


def test_it_reads_rendered_pictures() -> None:
    """The bar is 99.5 %: of 400 held-out scenes two may be misread."""
    data = ShapesData()
    scenes = [data.scene(index) for index in range(400)]
    wrong = [index for index, one in enumerate(scenes) if not drawn_right(read(render(one)), one.meaning)["exact"]]
    assert len(wrong) <= 2, wrong


def test_it_reads_single_objects() -> None:
    rng = np.random.default_rng(11)
    scenes = [one for one in (draw_scene(rng) for _ in range(160)) if len(one.meaning.things) == 1]
    assert len(scenes) > 20
    assert [one for one in scenes if not drawn_right(read(render(one)), one.meaning)["exact"]] == []


def test_a_reading_says_what_and_where(picture: np.ndarray) -> None:
    reading = read(picture)
    assert (reading.background, reading.unreadable) == ("grey", None)
    found = dict(zip(reading.things, reading.centres, strict=True))
    assert set(found) == {CIRCLE, STAR}
    np.testing.assert_allclose([found[CIRCLE], found[STAR]], SCENE.centres, atol=0.5)


def paint(picture: np.ndarray, thing: str, rgb: tuple[int, ...], radius: float, centre: tuple[float, float]) -> None:
    """Draw an object of any colour over a picture."""
    rows, columns, alpha = coverage(thing, radius, centre)
    patch = picture[rows, columns].astype(np.float64)
    picture[rows, columns] = np.rint(patch + alpha[..., None] * (np.array(rgb) - patch)).astype(np.uint8)


def test_a_blank_has_nothing_to_count() -> None:
    blank = render(Scene(Meaning((), None, "navy"), (), (0.05, 0.05)))
    reading = read(blank)
    assert (reading.unreadable, reading.background, reading.things) == ("count", "navy", ())


@pytest.mark.parametrize("level", [0, 70, 190, 255])
def test_a_plain_picture_of_no_known_background_is_unreadable(level: int) -> None:
    plain = np.full((64, 64, 3), (level, 255 - level, level // 2), np.uint8)
    assert read(plain) == Reading(unreadable="background")


def test_noise_is_unreadable() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert read(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).unreadable is not None
    noisy = render(SCENE) + rng.normal(0, 60, (64, 64, 3))
    assert read(np.clip(noisy, 0, 255).astype(np.uint8)).unreadable is not None


def test_a_third_object_is_not_overlooked(picture: np.ndarray) -> None:
    three = picture.copy()
    paint(three, "square", COLOURS["green"], SIZES["small"], (13.0, 53.0))
    assert read(three).unreadable == "count"


def test_specks_are_not_overlooked(picture: np.ndarray) -> None:
    """Fragments too small for objects, but more than the edge of one: the picture has a ghost."""
    specks = picture.copy()
    for x, y in ((5, 5), (58, 6), (7, 58), (58, 58)):
        specks[y : y + 2, x : x + 2] = (250, 250, 250)
    assert read(specks).unreadable == "count"


@pytest.mark.parametrize("sigma", [1.5, 2.5, 4.0])
def test_a_blurred_picture_is_unreadable(picture: np.ndarray, sigma: float) -> None:
    blurred = ndimage.gaussian_filter(picture.astype(np.float64), (sigma, sigma, 0))
    assert read(np.rint(blurred).astype(np.uint8)).unreadable is not None


@pytest.mark.parametrize(("a", "b"), [("red", "green"), ("green", "blue"), ("yellow", "blue"), ("red", "blue")])
def test_a_colour_between_two_is_unreadable(a: str, b: str) -> None:
    between = tuple((p + q) // 2 for p, q in zip(COLOURS[a], COLOURS[b], strict=True))
    assert min(np.linalg.norm(np.subtract(between, rgb)) for rgb in COLOURS.values()) > COLOUR_TOLERANCE
    drawn = render(Scene(Meaning((), None, "black"), (), (0.0, 0.0)))
    paint(drawn, "circle", between, SIZES["large"], (30.0, 30.0))
    assert read(drawn).unreadable == "colour"


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(slice(26, 34), slice(38, 46), id="wedge"),
        pytest.param(slice(20, 36), slice(30, 46), id="quarter"),
    ],
)
def test_a_broken_outline_is_unreadable(picture: np.ndarray, rows: slice, columns: slice) -> None:
    """The star without a part of it is none of the shapes."""
    broken = picture.copy()
    broken[rows, columns] = picture[2, 2]
    assert read(broken).unreadable is not None


@pytest.mark.parametrize("shape", ["circle", "square", "diamond"])
def test_a_small_hole_in_a_large_object_is_unreadable(shape: str) -> None:
    """4 × 4 pixels: too little for the outline's error, whose tolerance grows with the object."""
    drawn = render(Scene(Meaning((), None, "white"), (), (0.0, 0.0)))
    empty = drawn[31:35, 31:35].copy()
    paint(drawn, shape, COLOURS["purple"], SIZES["large"], (32.0, 32.0))
    assert read(drawn).unreadable is None
    drawn[31:35, 31:35] = empty
    assert read(drawn).unreadable == "shape"


@pytest.mark.parametrize("radius", [5.0, 11.5, 19.0])
@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_size_between_or_beyond_is_unreadable(shape: str, radius: float) -> None:
    """Not even as another shape: a square of 11.5 covers nearly what a small circle does."""
    drawn = render(Scene(Meaning((), None, "white"), (), (0.0, 0.0)))
    paint(drawn, shape, COLOURS["purple"], radius, (32.0, 32.0))
    assert read(drawn).unreadable is not None


def test_everything_right_is_exact(picture: np.ndarray) -> None:
    assert drawn_right(read(picture), MEANING) == dict.fromkeys((*ATTRIBUTES, "exact"), True)


@pytest.mark.parametrize(
    ("attribute", "changed"),
    [
        ("shape", replace(MEANING, things=(replace(CIRCLE, shape="ring"), STAR))),
        ("colour", replace(MEANING, things=(CIRCLE, replace(STAR, colour="cyan")))),
        ("size", replace(MEANING, things=(replace(CIRCLE, size="large"), STAR))),
        ("relation", replace(MEANING, relation="above")),
        ("background", replace(MEANING, background="black")),
    ],
)
def test_one_wrong_attribute_is_the_one_that_is_named(picture: np.ndarray, attribute: str, changed: Meaning) -> None:
    right = drawn_right(read(picture), changed)
    assert {name for name, fits in right.items() if not fits} == {attribute, "exact"}


@pytest.mark.parametrize(("relation", "fits"), [("right of", True), ("left of", False)])
def test_the_order_of_a_caption_is_free_when_its_relation_turns_too(
    picture: np.ndarray, relation: str, fits: bool
) -> None:
    """A star right of a circle is a circle left of a star."""
    right = drawn_right(read(picture), Meaning((STAR, CIRCLE), relation, "grey"))
    assert (right["relation"], right["exact"]) == (fits, fits)
    assert right["shape"] and right["colour"] and right["size"]


def test_another_number_of_objects_is_wrong(picture: np.ndarray) -> None:
    right = drawn_right(read(picture), Meaning((CIRCLE,), None, "grey"))
    assert right == dict.fromkeys((*ATTRIBUTES, "exact"), False) | {"background": True}


def test_what_is_unreadable_has_only_its_background_right() -> None:
    right = drawn_right(Reading(background="grey", unreadable="shape"), MEANING)
    assert right == dict.fromkeys((*ATTRIBUTES, "exact"), False) | {"background": True}


def test_the_reader_is_not_told_the_caption() -> None:
    """A picture of each meaning's neighbour is never read as the meaning itself."""
    rng = np.random.default_rng(5)
    for _ in range(25):
        one = draw_scene(rng, "validation")
        thing = one.meaning.things[0]
        other = rng.choice([shape for shape in world.SHAPES if shape != thing.shape])
        changed = replace(one.meaning, things=(replace(thing, shape=str(other)), one.meaning.things[1]))
        assert not drawn_right(read(render(replace(one, meaning=changed))), one.meaning)["exact"]
