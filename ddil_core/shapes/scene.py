"""Scenes of the shapes world: what an image shows, what its caption says, and which scenes only validation has.

A scene has one or two objects on a shaded background. Its *meaning* is what the caption says: shape, colour, size,
relation and background. The places of the objects and the shading are free, so one caption has many images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "moon")
COLOURS = {
    "red": (214, 40, 40),
    "yellow": (248, 222, 60),
    "green": (40, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 80, 210),
    "purple": (125, 50, 170),
}
BACKGROUNDS = {
    "black": (22, 22, 24),
    "grey": (128, 128, 128),
    "white": (238, 238, 236),
    "navy": (22, 34, 84),
    "brown": (112, 74, 44),
}
SIZES = {"small": 9.0, "large": 14.0}
"""Circumscribed radius in pixels."""
RELATIONS = ("left of", "right of", "above", "below")
"""The place of the first object relative to the second."""
LATTICE = 8.0
"""The coordinates of objects' centres are multiples of this, in pixels."""
MARGIN = 1.5
"""The smallest distance of an object from the image's border, in pixels."""
OFFSET = IMAGE_SIZE / 2
"""The smallest distance of two objects' centres along the axis of their relation, in pixels."""
DRIFT = LATTICE
"""The largest distance of an object's centre from the image's middle across that axis, in pixels.

Even where one object drifts up and the other down, their relation stays clear.
"""
SHADING = 0.10
"""The largest relative change of the background's brightness from the centre to a border."""
HELD_OUT_SHARE = 8
"""One in this many pairs of (shape, colour) objects belongs to validation."""

_OBJECT = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"^{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})? on an? ({'|'.join(BACKGROUNDS)}) background$"
)


@dataclass(frozen=True)
class Thing:
    """One object as the caption describes it."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Meaning:
    """What a caption says. ``relation`` is None exactly where there is one object."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        objects = f" {self.relation} ".join(str(thing) for thing in self.things)
        return f"{objects} on a {self.background} background"


@dataclass(frozen=True)
class Scene:
    """A meaning, and all else that an image needs.

    Attributes:
        meaning: What the caption says.
        centres: The objects' centres (x, y) in pixels, y down.
        shading: The brightness gradient (horizontal, vertical) relative to the background, each in [-SHADING, SHADING].
    """

    meaning: Meaning
    centres: tuple[tuple[float, float], ...]
    shading: tuple[float, float]


def parse_caption(caption: str) -> Meaning:
    """Return the meaning of a caption.

    Raises:
        ValueError: the shapes world does not write such a caption.
    """
    match = _CAPTION.match(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"the caption {caption!r} is not of the shapes world; write it like "
            "'a small red circle left of a large blue star on a grey background'"
        )
    *objects, background = match.groups()
    things = [Thing(*objects[:3])]
    if objects[3] is not None:
        things.append(Thing(*objects[4:]))
    return Meaning(tuple(things), objects[3], background)


def is_held_out(meaning: Meaning) -> bool:
    """Whether the unordered pair of (shape, colour) objects belongs to validation. A single object never does."""
    if len(meaning.things) < 2:
        return False
    key = "|".join(sorted(f"{thing.colour} {thing.shape}" for thing in meaning.things))
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Return the place of the first centre relative to the second. The larger of the two offsets decides."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def nearly(meaning: Meaning, rng: np.random.Generator) -> Meaning:
    """Return a meaning that differs in one attribute of an object, in the relation or in the background."""
    choices = ["shape", "colour", "size", "background"] + (["relation"] if meaning.relation else [])
    attribute = str(rng.choice(choices))
    values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "background": BACKGROUNDS, "relation": RELATIONS}[
        attribute
    ]
    if attribute == "background":
        return replace(meaning, background=_another(values, meaning.background, rng))
    if attribute == "relation" and meaning.relation:
        return replace(meaning, relation=_another(values, meaning.relation, rng))
    things = list(meaning.things)
    which = int(rng.integers(len(things)))
    things[which] = replace(things[which], **{attribute: _another(values, getattr(things[which], attribute), rng)})
    return replace(meaning, things=tuple(things))


def _another(values: Iterable[str], value: str, rng: np.random.Generator) -> str:
    return str(rng.choice([other for other in values if other != value]))


def draw_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Draw a random scene of a split.

    A scene of ``train`` has one object with probability 1/4, or else a pair that does not belong to validation.
    A scene of ``validation`` always has a pair that belongs to validation. So the splits share no pair of objects.

    Raises:
        ValueError: there is no such split.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"unknown split {split!r} of the shapes world; it has 'train' and 'validation'")
    while True:
        count = 1 if split == "train" and rng.random() < 0.25 else 2
        things = tuple(
            Thing(str(rng.choice(list(SIZES))), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
            for _ in range(count)
        )
        if count == 2 and (things[0].colour, things[0].shape) == (things[1].colour, things[1].shape):
            continue
        meaning = Meaning(
            things, str(rng.choice(RELATIONS)) if count == 2 else None, str(rng.choice(list(BACKGROUNDS)))
        )
        if is_held_out(meaning) == (split == "validation"):
            return place(meaning, rng)


def place(meaning: Meaning, rng: np.random.Generator) -> Scene:
    """Draw the free parameters of a meaning: the objects' places and the shading.

    Centres lie on the lattice. Objects lie inside the image and apart from each other, and their relation is clear.
    """
    choices = _placements(tuple(SIZES[thing.size] for thing in meaning.things), meaning.relation)
    centres = choices[rng.integers(len(choices))]
    return Scene(meaning, centres, tuple(rng.uniform(-SHADING, SHADING, 2).tolist()))


@cache
def _placements(radii: tuple[float, ...], relation: str | None) -> list[tuple[tuple[float, float], ...]]:
    """Return all centres that objects of these radii can have together."""
    candidates = product(*([(x, y) for x in _places(radius) for y in _places(radius)] for radius in radii))
    return [centres for centres in candidates if relation is None or _clearly(relation, centres)]


def _places(radius: float) -> list[float]:
    """Return the coordinates on the lattice at which an object of this radius lies inside the image."""
    lattice = np.arange(0.0, IMAGE_SIZE, LATTICE)
    return lattice[(lattice >= radius + MARGIN) & (lattice <= IMAGE_SIZE - radius - MARGIN)].tolist()


def _clearly(relation: str, centres: tuple[tuple[float, float], ...]) -> bool:
    along = 0 if relation in ("left of", "right of") else 1
    distance = abs(centres[0][along] - centres[1][along])
    drift = max(abs(centre[1 - along] - IMAGE_SIZE / 2) for centre in centres)
    return distance >= OFFSET and drift <= DRIFT and relation_of(*centres) == relation
