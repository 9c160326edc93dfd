"""Recipes: how images are prepared and what they are compared with, as data in ``protocols/recipes.yaml``.

A preparation is Pillow's arithmetic, bit for bit: crop, resize of uint8 with antialiasing, and JPEG where the recipe
stores images as JPEG. The network of a metric then resizes to its own input size (299 px for Inception, 224 px for
CLIP).
"""

from __future__ import annotations

import difflib
import io
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import AliasChoices, Field, model_validator

from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import user_path
from ddil_core.support.protocol import Strict, read_yaml, validate
from ddil_core.support.resources import protocols

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Clip(Strict):
    """The CLIP model of a score.

    Attributes:
        model: open_clip's name of the model.
        weights: open_clip's name of the weights.
        prefix: Text before each caption.
        size: Side in pixels of prepared images; None for the recipe's size.
    """

    model: str
    weights: str
    prefix: str = ""
    size: int | None = Field(default=None, ge=1)


class ReferenceSpec(Strict):
    """The reference of a recipe.

    ``images`` was ``pictures`` before. Recipes may use both names; records and hashes keep the former.

    Attributes:
        data: The kind of the data set.
        images: The number of its images.
    """

    data: str
    images: int | None = Field(
        ge=2, validation_alias=AliasChoices("images", "pictures"), serialization_alias="pictures"
    )


class Recipe(Strict):
    """One recipe. What a recipe does not use may be left out.

    Attributes:
        name: The name of the recipe, which is its key in the file.
        source: Where the preparation was read.
        images: The number of generated images.
        reference: The data set that they are compared with, and the number of its images.
        crop: "centre" crops to the short side; "none" changes the aspect ratio instead.
        size: The side in pixels after the resize; None leaves the size as it is.
        filter: The filter of Pillow's antialiased resize of uint8. A recipe with a size has one.
        jpeg: The JPEG quality of the prepared image; None is PNG, which changes nothing.
        jpeg_generated: The JPEG quality of the generated image before the resize.
        fid_input: How Inception's input of 299 px is made.
        patch: The side of the centre patch for patch_fid, cut from the raw image.
        clip: The CLIP model of the CLIP score.
        metrics: The metrics of the recipe.
    """

    name: str
    source: str = "ours"
    images: int | None = Field(ge=2)
    reference: ReferenceSpec
    crop: Literal["centre", "none"] = "none"
    size: int | None = Field(default=None, ge=1)
    filter: Filter | None = None
    jpeg: int | None = Field(default=None, ge=1, le=100)
    jpeg_generated: int | None = Field(default=None, ge=1, le=100)
    fid_input: Literal["clean-fid", "pytorch-fid"] | None = None
    patch: int | None = Field(default=None, ge=1)
    clip: Clip | None = None
    metrics: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _require_size_with_filter(self) -> Recipe:
        if (self.size is None) != (self.filter is None):
            raise ValueError("a recipe has both a size and a filter, or neither")
        return self

    def label(self, num_images: int, num_reference_images: int) -> str:
        """Return the name that a table prints: with both numbers where they differ from the recipe's."""
        if (num_images, num_reference_images) == (self.images, self.reference.images):
            return self.name
        return f"{self.name} ({num_images:,} → {num_reference_images:,})"

    def preparation(self, metric: str, *, generated: bool) -> Preparation:
        """Return how images are prepared for ``metric``: ``generated`` images, or reference images."""
        jpeg_before = self.jpeg_generated if generated else None
        if metric == "patch_fid":
            return Preparation(patch=self.patch, jpeg_before=jpeg_before)
        preparation = Preparation(jpeg_before, self.crop == "centre", self.size, self.filter, self.jpeg)
        if metric.startswith("clip_score") and self.clip is not None and self.clip.size is not None:
            return replace(preparation, size=self.clip.size)
        return preparation


@dataclass(frozen=True)
class Preparation:
    """The steps of preparing an image, in this order; None or False skips a step.

    Attributes:
        jpeg_before: Quality of JPEG for the raw image.
        crop: Crop to the centred square of the short side.
        size: Side in pixels after the resize.
        filter: Pillow's filter of the resize.
        jpeg: Quality of JPEG for the result.
        patch: Side in pixels of the centre patch, cut before the crop. A smaller image stays whole.
    """

    jpeg_before: int | None = None
    crop: bool = False
    size: int | None = None
    filter: Filter | None = None
    jpeg: int | None = None
    patch: int | None = None

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Prepare an image: uint8 [H, W, 3] → uint8 [h, w, 3]."""
        image = through_jpeg(image, self.jpeg_before)
        if self.patch is not None and min(image.shape[:2]) >= self.patch:  # as in DMD2: a smaller image stays whole
            image = centre_crop(image, self.patch)
        if self.crop:
            image = centre_crop(image, min(image.shape[:2]))
        if self.size is not None and self.filter is not None:
            image = resize(image, self.size, self.filter)
        return through_jpeg(image, self.jpeg)

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (H, W) that an image of this size has after the preparation."""
        if self.patch is not None and min(size) >= self.patch:
            size = (self.patch, self.patch)
        if self.crop:
            size = (min(size), min(size))
        return size if self.size is None else (self.size, self.size)


def centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """Return the centred ``side`` × ``side`` of uint8 [H, W, 3], placed as torchvision's ``center_crop`` does."""
    top, left = (round((length - side) / 2) for length in image.shape[:2])  # both round halves to the even number
    return image[top : top + side, left : left + side]


def resize(image: np.ndarray, size: int, filter: Filter) -> np.ndarray:
    """Resize uint8 [H, W, 3] to uint8 [size, size, 3] with Pillow's antialiased resize of 8-bit images."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling[filter.upper()]))


def through_jpeg(image: np.ndarray, quality: int | None) -> np.ndarray:
    """Return uint8 [H, W, 3] after Pillow has stored it as JPEG of this quality; None: return it unchanged."""
    if quality is None:
        return image
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))


def load_recipe(reference: str) -> Recipe:
    """Return a recipe of ``protocols/recipes.yaml`` by name, or the one recipe in a YAML file of the same form.

    Raises:
        WrongCommand: there is no such recipe, its keys are wrong, or it has the name of a different shipped recipe.
    """
    shipped = protocols() / "recipes.yaml"
    if reference.endswith((".yaml", ".yml")):
        path = user_path(reference, "the recipe")
        known = read_yaml(path)
        if len(known) != 1:
            raise WrongCommand(f"{path} holds {len(known)} recipes, and a file must hold one; remove the others")
        name = next(iter(known))
    else:
        path, name = shipped, reference
        known = read_yaml(path)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise WrongCommand(
            f"the recipe {name!r} is not known; it may be one of {', '.join(known)}, or a YAML file{hint}"
        )
    content = known[name] if isinstance(known[name], dict) else {}
    recipe = validate(Recipe, {"name": name} | content, f"the recipe {name!r} of {path}")
    if path != shipped:
        of_same_name = read_yaml(shipped).get(name)
        if of_same_name is not None and recipe != Recipe.model_validate({"name": name} | of_same_name):
            raise WrongCommand(
                f"{path} calls its recipe {name!r}, and a different shipped recipe has this name; choose another name"
            )
    return recipe


def recipe_for(data: str) -> str:
    """Return the name of the recipe that belongs to a data set reference.

    Raises:
        WrongCommand: no recipe belongs to this kind of data set, or there is no such data set.
    """
    kind = data.partition(":")[0]
    worlds = {"shapes": "shapes", "gaussians": "gaussians"}
    recipes = worlds | {"coco2014": "gigagan", "coco2017": "coco2017-5k", "folder": "folder-256"}
    if kind not in recipes:
        from ddil_core.data.datasets import open_data

        open_data(data)  # raises where there is no such data set
        raise WrongCommand(f"no recipe belongs to the data set {data!r}; name one with --recipe")
    return recipes[kind]
