"""The sizes of images, checked before any image is made: each metric must get images that it takes and can compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddil_core.data.captioned import Survey
from ddil_core.support.errors import WrongCommand
from ddil_core.support.size import pixels
from ddil_eval.features.extraction import require_fitting
from ddil_eval.features.recipes import Recipe
from ddil_eval.metrics import METRICS

_NAMED = 3
"""The most sizes that a message names."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of some images before their preparation.

    Attributes:
        what: Names the images in messages, as in "the images of DIR".
        sizes: The name of one image for each size; an empty name where the images are made by a program.
    """

    what: str
    sizes: Mapping[Size, str]

    @classmethod
    def of(cls, surveyed: Survey, what: str) -> ImageSizes:
        """Return the sizes of image files by their heads."""
        return cls(what, {(height, width): name for (width, height), name in surveyed.sizes.items()})

    @classmethod
    def drawn(cls, model: str, size: Size) -> ImageSizes:
        """Return the size of the images that a model draws. ``model`` is its reference."""
        return cls(f"the images of the model {model}", {size: ""})

    def listed(self) -> str:
        """Return the first sizes for a message, and the number of the others."""
        ordered = sorted(self.sizes.items(), key=lambda item: (item[0][1], item[0][0]))
        named = [pixels(size) + (f" ({name})" if name else "") for size, name in ordered[:_NAMED]]
        rest = len(ordered) - _NAMED
        return ", ".join(named) + (f" and {rest:,} more" if rest > 0 else "")


NO_SIZES = ImageSizes("the images of the reference", {})
"""The sizes of a reference that no metric compares with, or whose sizes are not known."""


def require_one_size(images: ImageSizes, recipe: Recipe, metrics: Sequence[str], *, generated: bool = True) -> None:
    """Refuse images that still have several sizes after the preparation for a metric.

    A recipe with a patch leaves small images whole and takes them one by one, so that it accepts every size.

    Raises:
        WrongCommand: the images have several sizes, and the recipe leaves them so.
    """
    for metric in metrics:
        preparation = recipe.preparation(metric, generated=generated)
        if preparation.patch is None and len({preparation.size_of(size) for size in images.sizes}) > 1:
            raise WrongCommand(
                f"{images.what} have {len(images.sizes):,} sizes, {images.listed()}, and the recipe {recipe.name!r} "
                "does not resize; name a recipe that resizes, or put each size into a folder of its own"
            )


def require_sizes(
    images: ImageSizes,
    reference: ImageSizes,
    recipe: Recipe,
    metrics: Sequence[str],
    captions: Sequence[str],
) -> None:
    """Refuse images that a metric cannot take, or cannot compare with the reference.

    Args:
        images: The sizes of the images that are measured.
        reference: The sizes of the reference's images; empty where they are not known.
        recipe: How images are prepared.
        metrics: The names of the metrics.
        captions: The captions of the images.

    Raises:
        WrongCommand: a metric does not fit the recipe, or the images have several sizes after the preparation, another
            size than the reference's, or a size or captions that a metric does not take.
    """
    require_fitting(metrics, recipe)
    require_one_size(images, recipe, metrics)
    for metric in metrics:
        row = METRICS.find(metric)
        preparation = recipe.preparation(metric, generated=True)
        prepared = {preparation.size_of(size) for size in images.sizes}
        for size in prepared:
            row.network.require(size, captions)
        of_reference = recipe.preparation(metric, generated=False)
        compared = {of_reference.size_of(size) for size in reference.sizes}
        if row.kind == "set" and preparation.patch is None and compared and compared != prepared:
            raise WrongCommand(
                f"{images.what} have {images.listed()}, {reference.what} have {reference.listed()}, and the recipe "
                f"{recipe.name!r} does not resize; name a recipe that resizes, or images and a reference of one size"
            )
