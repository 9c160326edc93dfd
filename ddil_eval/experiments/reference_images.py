"""The reference of a measurement. It must belong to the recipe, and its files are checked before any image is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddil_core.data.base import DataSet
from ddil_core.data.captioned import survey
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments.image_sizes import ImageSizes, require_one_size
from ddil_eval.features.recipes import Recipe, load_recipe, recipe_for
from ddil_eval.features.reference_features import content_sha256
from ddil_eval.metrics import METRICS


def refuse_other_reference(recipe: Recipe, reference: str) -> None:
    """Refuse a data set that is the reference of another recipe. A user's folder may hold anything.

    Raises:
        WrongCommand: the data set belongs to another recipe.
    """
    kind = reference.partition(":")[0]
    others = {"shapes", "gaussians", "coco2014", "coco2017"} - {recipe.reference.data}
    if kind in others and recipe.reference.data != "any":
        raise WrongCommand(
            f"the recipe {recipe.name!r} compares with {recipe.reference.data}, and {reference!r} is the reference of "
            f"another recipe, {recipe_for(reference)!r}; name that one, or a data set of {recipe.reference.data}"
        )


def number_of(wanted: int | None, data: DataSet) -> int:
    """Return how many images of a data set are taken: the wanted number, or all images of a folder or of COCO.

    Raises:
        WrongCommand: no number is wanted, and the data set does not say how many images it has.
    """
    if wanted is not None:
        return wanted
    if isinstance(data, ImageFiles):
        return len(data.files)
    raise WrongCommand(
        f"the recipe takes all images, and {data.reference!r} has no end; say how many with --num-images and "
        "--reference-images"
    )


def split_of(data: DataSet) -> str:
    """Return the name of a data set's evaluation split."""
    return getattr(data, "split", "validation")


def describe_reference(data: DataSet, count: int, metrics: Sequence[str]) -> dict[str, Any]:
    """Return what a record says of the data set: the hash of ``count`` images too, if a metric compares with them."""
    described = {"reference": data.reference, "split": split_of(data)}
    if any(METRICS[name].kind == "set" for name in metrics):
        described["reference_sha256"] = content_sha256(data, count)
    return described


def check_reference(data: DataSet, count: int, recipe: Recipe, metrics: Sequence[str]) -> ImageSizes:
    """Check the reference's files before any image is made, and warn of what reading them changes.

    Returns:
        The sizes of the first ``count`` images; no sizes where the data set does not say them.

    Raises:
        WrongCommand: images that a metric compares with keep several sizes under the recipe.
        DdilError: an image is missing or damaged.
    """
    what = f"the images of the reference {data.reference}"
    if not isinstance(data, ImageFiles):
        return ImageSizes(what, {} if data.side is None else {(data.side, data.side): ""})
    surveyed = survey(data.take(count, "images"), data.reference)
    surveyed.warn_of_changes()
    sizes = ImageSizes.of(surveyed, what)
    compared = [name for name in metrics if METRICS.find(name).kind == "set"]
    require_one_size(sizes, recipe, compared, generated=False)
    return sizes


def open_reference(reference: str, recipe: str | None, num_images: int | None) -> tuple[Recipe, DataSet, int]:
    """Open a data set with its recipe.

    Args:
        reference: The reference of the data set.
        recipe: The name of the recipe. Defaults to the recipe of the data set.
        num_images: The number of images to compare with. Defaults to the recipe's number.

    Returns:
        The recipe, the data set, and the number of images.

    Raises:
        WrongCommand: recipe and data set do not fit each other.
    """
    chosen = load_recipe(recipe or recipe_for(reference))
    refuse_other_reference(chosen, reference)
    data = open_data(reference)
    return chosen, data, number_of(num_images or chosen.reference.images, data)
