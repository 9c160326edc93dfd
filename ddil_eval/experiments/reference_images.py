"""The reference set of a measurement: that it is the recipe's, and that its files are there, before any picture is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddil_core.data.base import DataSet
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles, survey
from ddil_core.support.errors import WrongCommand
from ddil_eval.features.recipes import Recipe, load_recipe, recipe_for
from ddil_eval.features.reference_features import content_sha256
from ddil_eval.metrics import METRICS


def refuse_other_reference(recipe: Recipe, reference: str) -> None:
    """Refuse a named data set that is the reference of another recipe. A folder of one's own may hold anything.

    Raises:
        WrongCommand: it is.
    """
    kind = reference.partition(":")[0]
    if kind in ("shapes", "coco2014", "coco2017") and kind != recipe.reference.data:
        raise WrongCommand(
            f"the recipe {recipe.name!r} compares with {recipe.reference.data}, and {reference!r} is the reference of "
            f"another recipe, {recipe_for(reference)!r}; name that one, or a data set of {recipe.reference.data}"
        )


def split_of(data: DataSet) -> str:
    """The name of a data set's evaluation split."""
    return getattr(data, "split", "validation")


def describe_reference(data: DataSet, count: int, metrics: Sequence[str]) -> dict[str, Any]:
    """For a record: which data set and split and, where ``metrics`` compare with its pictures, a hash of those."""
    described = {"reference": data.reference, "split": split_of(data)}
    if any(METRICS[name].kind == "set" for name in metrics):
        described["reference_sha256"] = content_sha256(data, count)
    return described


def check_reference(data: DataSet, count: int) -> None:
    """Look at the reference's files before any picture is made, and warn of what reading them changes."""
    if isinstance(data, ImageFiles):
        survey(data.take(count, "pictures"), data.reference).warn_of_changes()


def open_reference(reference: str, recipe: str | None, pictures: int | None) -> tuple[Recipe, DataSet, int]:
    """A data set, the recipe that is named or belongs to it, and how many pictures are compared with: the recipe's where None.

    Raises:
        WrongCommand: the two do not fit each other, or the data set has fewer pictures.
        DdilError: some are missing or damaged.
    """
    chosen = load_recipe(recipe or recipe_for(reference))
    refuse_other_reference(chosen, reference)
    data, count = open_data(reference), pictures or chosen.reference.pictures
    check_reference(data, count)
    return chosen, data, count
