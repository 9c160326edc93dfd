"""Scenes and captions: they parse back, the splits share no pair, and what a caption states is clearly so."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest

from ddil_core.shapes import scene
from ddil_core.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Meaning,
    Scene,
    Thing,
    draw_scene,
    is_held_out,
    nearly,
    parse_caption,
    relation_of,
)

KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@cache
def scenes(split: str) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [draw_scene(rng, split) for _ in range(1500)]


@pytest.fixture(scope="module", params=["train", "validation"])
def drawn(request: pytest.FixtureRequest) -> tuple[str, list[Scene]]:
    return request.param, scenes(request.param)


def pair_of(meaning: Meaning) -> frozenset[tuple[str, str]]:
    return frozenset((thing.colour, thing.shape) for thing in meaning.things)


def test_captions_parse_back(drawn: tuple[str, list[Scene]]) -> None:
    for one in drawn[1]:
        assert parse_caption(one.meaning.caption) == one.meaning


def test_a_caption_reads_as_documented() -> None:
    things = (Thing("small", "red", "circle"), Thing("large", "blue", "star"))
    caption = "a small red circle left of a large blue star on a grey background"
    assert Meaning(things, "left of", "grey").caption == caption
    assert parse_caption(f"  {caption.capitalize()}\n") == Meaning(things, "left of", "grey")
    assert parse_caption("a small cyan ring on a navy background") == Meaning(
        (Thing("small", "cyan", "ring"),), None, "navy"
    )


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle on a grey background",
        "a small red circle",
        "a small red circle near a large blue star on a grey background",
        "a small red circle left of a large blue star on a grey background, please",
        "a small teal circle on a grey background",
    ],
)
def test_a_caption_of_another_world_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="is not of the shapes world; write it like"):
        parse_caption(caption)


def test_holding_out_depends_on_the_unordered_pair_alone() -> None:
    """Every pair of (colour, shape), in both orders, under other sizes, relations and backgrounds."""
    held_out = 0
    for a, b in combinations(KINDS, 2):
        verdicts = {
            is_held_out(Meaning((Thing("small", *first), Thing(size, *second)), relation, background))
            for first, second in ((a, b), (b, a))
            for size, relation, background in (("small", "above", "black"), ("large", "left of", "white"))
        }
        assert len(verdicts) == 1
        held_out += verdicts == {True}
    pairs = len(KINDS) * (len(KINDS) - 1) // 2
    assert held_out / pairs == pytest.approx(1 / scene.HELD_OUT_SHARE, rel=0.2)


def test_single_objects_are_for_training_alone() -> None:
    singles = [
        Meaning((Thing(size, *kind),), None, background)
        for size, kind, background in product(SIZES, KINDS, BACKGROUNDS)
    ]
    assert not any(map(is_held_out, singles))


def test_the_splits_share_no_pair() -> None:
    train, validation = scenes("train"), scenes("validation")
    assert {len(one.meaning.things) for one in validation} == {2}
    shared = {pair_of(one.meaning) for one in train} & {pair_of(one.meaning) for one in validation}
    assert shared == set()


def test_training_shows_every_word(drawn: tuple[str, list[Scene]]) -> None:
    """Both splits use every shape, colour, size, relation and background; a quarter of training scenes has one object."""
    split, found = drawn
    things = [thing for one in found for thing in one.meaning.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.size for thing in things} == set(SIZES)
    assert {one.meaning.background for one in found} == set(BACKGROUNDS)
    assert {one.meaning.relation for one in found} - {None} == set(RELATIONS)
    singles = np.mean([len(one.meaning.things) == 1 for one in found])
    assert singles == (pytest.approx(0.25, abs=0.05) if split == "train" else 0)
    assert all((one.meaning.relation is None) == (len(one.meaning.things) == 1) for one in found)


def test_relations_hold_clearly(drawn: tuple[str, list[Scene]]) -> None:
    for one in drawn[1]:
        if one.meaning.relation is None:
            continue
        (x1, y1), (x2, y2) = one.centres
        offset = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}[one.meaning.relation]
        across = (y1, y2) if one.meaning.relation.endswith("of") else (x1, x2)
        assert offset >= scene.OFFSET
        assert all(abs(c - IMAGE_SIZE / 2) <= scene.DRIFT for c in across)
        assert relation_of(*one.centres) == one.meaning.relation


def test_objects_lie_inside_and_apart(drawn: tuple[str, list[Scene]]) -> None:
    for one in drawn[1]:
        radii = [SIZES[thing.size] for thing in one.meaning.things]
        for radius, centre in zip(radii, one.centres, strict=True):
            assert all(radius + 1 <= c <= IMAGE_SIZE - radius - 1 for c in centre)
        if len(radii) == 2:
            assert np.hypot(*np.subtract(*one.centres)) >= sum(radii) + 3


def test_no_pair_is_two_of_a_kind(drawn: tuple[str, list[Scene]]) -> None:
    assert all(len(pair_of(one.meaning)) == len(one.meaning.things) for one in drawn[1])


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test' of the shapes world; it has 'train' and 'validation'"):
        draw_scene(np.random.default_rng(0), "test")


def test_a_near_meaning_differs_in_one_attribute() -> None:
    rng = np.random.default_rng(0)
    changed = set()
    for index in range(300):
        meaning = draw_scene(np.random.default_rng(index)).meaning
        near = nearly(meaning, rng)
        assert parse_caption(near.caption) == near
        a, b = (dict(_attributes(m)) for m in (meaning, near))
        (different,) = [key for key in a if a[key] != b[key]]
        changed.add(different.split(".")[-1])
    assert changed == {"shape", "colour", "size", "relation", "background"}


def _attributes(meaning: Meaning) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = [("relation", meaning.relation), ("background", meaning.background)]
    for index, thing in enumerate(meaning.things):
        found += [(f"{index}.{name}", getattr(thing, name)) for name in ("shape", "colour", "size")]
    return found


def test_a_meaning_of_one_object_has_no_relation_to_change() -> None:
    single = Meaning((Thing("small", "red", "circle"),), None, "grey")
    rng = np.random.default_rng(1)
    assert all(nearly(single, rng).relation is None for _ in range(40))
    assert replace(single, background="white") in {nearly(single, rng) for _ in range(200)}
