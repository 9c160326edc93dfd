"""Recipes: how pictures are prepared and what they are compared with, as data in ``protocols/recipes.yaml``.

A preparation is Pillow's own arithmetic, bit for bit: crop, resize of uint8 with antialiasing, and JPEG where a recipe
stores its pictures so. What a metric's network asks for after that (299 px for Inception, 224 px for CLIP) is the metric's.
"""

from __future__ import annotations

import difflib
import io
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import user_path
from ddil_core.support.protocol import Strict, read_yaml, validate
from ddil_core.support.resources import protocols

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Clip(Strict):
    """The CLIP model of a score: open_clip's names, the ``prefix`` before a caption, and the side in pixels that a picture is
    prepared to where it is not the recipe's own."""

    model: str
    weights: str
    prefix: str = ""
    size: int | None = Field(default=None, ge=1)


class ReferenceSpec(Strict):
    """What generated pictures are compared with: a kind of data set, and how many of its pictures."""

    data: str
    pictures: int = Field(ge=2)


class Recipe(Strict):
    """One recipe; ``protocols/recipes.yaml`` says what its keys mean."""

    name: str
    source: str
    images: int = Field(ge=2)
    reference: ReferenceSpec
    crop: Literal["centre", "none"]
    size: int | None = Field(ge=1)
    filter: Filter | None
    jpeg: int | None = Field(ge=1, le=100)
    jpeg_generated: int | None = Field(ge=1, le=100)
    fid_input: Literal["clean-fid", "pytorch-fid"] | None
    patch: int | None = Field(ge=1)
    clip: Clip | None
    metrics: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_size_has_its_filter(self) -> Recipe:
        if (self.size is None) != (self.filter is None):
            raise ValueError("a recipe has both a size and a filter, or neither")
        return self

    def label(self, images: int, pictures: int) -> str:
        """The name that a row prints: with the counts where they are not the recipe's own."""
        if (images, pictures) == (self.images, self.reference.pictures):
            return self.name
        return f"{self.name} ({images:,} → {pictures:,})"

    def preparation(self, metric: str, *, generated: bool) -> Preparation:
        """How ``metric`` sees a picture that was ``generated``, or one of the reference set."""
        before = self.jpeg_generated if generated else None
        if metric == "patch_fid":
            return Preparation(patch=self.patch, jpeg_before=before)
        whole = Preparation(before, self.crop == "centre", self.size, self.filter, self.jpeg)
        if metric.startswith("clip_score") and self.clip is not None and self.clip.size is not None:
            return replace(whole, size=self.clip.size)
        return whole


@dataclass(frozen=True)
class Preparation:
    """What happens to a picture, in this order; None and False leave it as it is."""

    jpeg_before: int | None = None
    crop: bool = False
    size: int | None = None
    filter: Filter | None = None
    jpeg: int | None = None
    patch: int | None = None

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] → uint8 [h, w, 3]."""
        image = through_jpeg(image, self.jpeg_before)
        if self.patch is not None and min(image.shape[:2]) >= self.patch:  # as DMD2 does: a smaller one is taken whole
            image = centre_crop(image, self.patch)
        if self.crop:
            image = centre_crop(image, min(image.shape[:2]))
        if self.size is not None and self.filter is not None:
            image = resize(image, self.size, self.filter)
        return through_jpeg(image, self.jpeg)


def centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """The middle ``side`` × ``side`` of uint8 [H, W, 3]; an odd rest is split as torchvision's ``center_crop`` splits it."""
    top, left = (round((length - side) / 2) for length in image.shape[:2])  # halves go to the even number there too
    return image[top : top + side, left : left + side]


def resize(image: np.ndarray, size: int, filter: Filter) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [size, size, 3], Pillow's antialiased resize of 8-bit pictures."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling[filter.upper()]))


def through_jpeg(image: np.ndarray, quality: int | None) -> np.ndarray:
    """What is left of a picture, uint8 [H, W, 3], that was stored as JPEG by Pillow; None: it was not."""
    if quality is None:
        return image
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))


def load_recipe(reference: str) -> Recipe:
    """A recipe by name, or from a YAML file of one's own that holds one recipe by its name, as ``protocols/recipes.yaml`` does.

    Raises:
        WrongCommand: there is no such recipe, or its keys do not fit.
    """
    shipped = protocols() / "recipes.yaml"
    if reference.endswith((".yaml", ".yml")):
        path = user_path(reference, "the recipe")
        known = read_yaml(path)
        if len(known) != 1:
            raise WrongCommand(f"{path} holds {len(known)} recipes, and one file gives one; leave the others out")
        name = next(iter(known))
    else:
        path, name = shipped, reference
        known = read_yaml(path)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise WrongCommand(
            f"the recipe {name!r} is not known; it may be one of {', '.join(known)}, or a YAML file{hint}"
        )
    content = known[name] if isinstance(known[name], dict) else {}
    recipe = validate(Recipe, {"name": name} | content, f"the recipe {name!r} of {path}")
    if (
        path != shipped
        and name in (own := read_yaml(shipped))
        and recipe != Recipe.model_validate({"name": name} | own[name])
    ):
        raise WrongCommand(
            f"{path} calls its recipe {name!r}, as a shipped recipe that differs is called; give it a name of its own"
        )
    return recipe


def recipe_for(data: str) -> str:
    """The recipe that a data set reference gets where none is named.

    Raises:
        WrongCommand: the kind of data set has none, or there is no such data set.
    """
    kind = data.partition(":")[0]
    usual = {"shapes": "shapes", "coco2014": "gigagan", "coco2017": "coco2017-5k"}
    if kind not in usual:
        from ddil_core.data.datasets import open_data

        open_data(data)  # what is no data set at all is refused as that
        raise WrongCommand(f"the data set {data!r} has no recipe of its own; name one with --recipe")
    return usual[kind]
