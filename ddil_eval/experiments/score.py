"""Pictures of folders, made by this program or another, against one reference: the same recipes and metrics, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import Field, field_validator

from ddil_core.data.base import DataSet
from ddil_core.data.datasets import DATASETS, open_data
from ddil_core.data.folder import ImageFile, ImageFiles, files_sha256, name_some
from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import user_path
from ddil_core.support.protocol import Strict
from ddil_eval.experiments.coco import from_the_first
from ddil_eval.experiments.engine import measure_systems
from ddil_eval.experiments.image_sources import FolderImages, ImageOrigin, ImageSource, open_image_folder
from ddil_eval.experiments.reference_images import check_reference, describe_reference, refuse_other_reference
from ddil_eval.experiments.rows import Setting, System
from ddil_eval.features.extraction import RecipeExtractors
from ddil_eval.features.recipes import Recipe, load_recipe, recipe_for
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record, digest


class ScoreConfig(Strict):
    """Folders against one reference, as data: a folder, or a data set by reference. What is left out comes from the recipe;
    ``num_images`` and ``reference_pictures`` are all that there are where they are left out; ``seed``, that of the jackknife's
    groups, is the one that the pictures were drawn with, where they tell it, so that their intervals are those of the first
    time. Every ``pictures_per_prompt`` pictures that follow one another are of one prompt."""

    folders: tuple[str, ...] = Field(min_length=1)
    reference: str
    recipe: str | None = None
    num_images: int | None = Field(default=None, ge=4)
    pictures_per_prompt: int = Field(default=1, ge=1)
    reference_pictures: int | None = Field(default=None, ge=2)
    metrics: tuple[str, ...] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=64, ge=1)
    seed: int | None = Field(default=None, ge=0)

    @field_validator("folders")
    @classmethod
    def _each_once(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        twice = [folder for folder in folders if folders.count(folder) > 1]
        if twice:
            raise ValueError(f"the folder {twice[0]} is named twice")
        return folders


def score_folders(config: ScoreConfig, out: Path, device: str = "cpu") -> list[Record]:
    """Measure every folder and save its record below ``out``. Folders with the same ids are compared picture by picture, each
    with the first of them.

    Raises:
        WrongCommand: a folder or the reference does not fit; said before anything is scored.
        DdilError: a metric lacks its weights, or a picture is missing or damaged.
    """
    place = config.reference if config.reference.partition(":")[0] in DATASETS else f"folder:{config.reference}"
    recipe = load_recipe(config.recipe or recipe_for(place))
    refuse_other_reference(recipe, place)
    metrics = config.metrics or recipe.metrics
    reference = open_data(place)
    pictures = _count(reference, config, recipe)
    check_reference(reference, pictures)
    folders = {
        folder: open_image_folder(user_path(folder, "the folder"), config.num_images) for folder in config.folders
    }
    for folder, files in folders.items():
        _require_captions(folder, files, metrics)
        _require_groups(folder, files, config.pictures_per_prompt)
    extractors = RecipeExtractors(metrics, device, recipe, config.pictures_per_prompt)
    together: dict[str, list[str]] = {}
    for folder, files in folders.items():
        together.setdefault(digest([picture.id for picture in files]), []).append(folder)
    records = []
    for names in together.values():
        seed = _seed(config, names[0])
        setting = _setting(config, recipe, reference, pictures, folders[names[0]], seed, device)
        rows = [System(name, partial(_open, user_path(name, "the folder"), folders[name], config)) for name in names]
        records += measure_systems(rows, from_the_first(names), extractors, setting, out)
    return records


def _count(reference: DataSet, config: ScoreConfig, recipe: Recipe) -> int:
    """How many pictures of the reference: those asked for, else all of its files, else the recipe's count."""
    everything = len(reference.files) if isinstance(reference, ImageFiles) else recipe.reference.pictures
    count = config.reference_pictures or everything
    if count < 2:
        raise WrongCommand(f"the reference {config.reference} has {count} picture, and a set needs at least 2")
    return count


def _require_captions(folder: str, files: Sequence[ImageFile], metrics: Sequence[str]) -> None:
    """Refuse metrics that read captions where pictures have none."""
    reading = [name for name in metrics if name in METRICS and METRICS[name].network.reads_captions]
    silent = [picture.path.name for picture in files if picture.caption is None]
    if reading and silent:
        raise WrongCommand(
            f"{', '.join(reading)} needs captions, and {len(silent):,} of {len(files):,} pictures of {folder} have none "
            f"({name_some(silent)}); put a .txt beside each or an index.jsonl, or choose other --metrics"
        )


def _require_groups(folder: str, files: Sequence[ImageFile], number: int) -> None:
    """Refuse a folder whose pictures are not ``number`` of each prompt, one after another."""
    if len(files) % number:
        raise WrongCommand(
            f"the {len(files):,} pictures of {folder} are not {number} of each prompt; make the others, or name another "
            "pictures_per_prompt"
        )
    for start in range(0, len(files), number):
        first, *others = files[start : start + number]
        other = next((picture for picture in others if picture.caption != first.caption), None)
        if other is not None:
            raise WrongCommand(
                f"{first.path.name} and {other.path.name} of {folder} have two captions, {first.caption!r} and "
                f"{other.caption!r}, where {number} pictures that follow one another are of one prompt; put them in that order"
            )


def _seed(config: ScoreConfig, folder: str) -> int:
    """The seed of the jackknife's groups: the one asked for, else that of the folder's pictures, else 0."""
    made = ImageOrigin.read(user_path(folder, "the folder")).seed
    return next((seed for seed in (config.seed, made) if seed is not None), 0)


def _open(folder: Path, files: Sequence[ImageFile], config: ScoreConfig) -> ImageSource:
    made = replace(ImageOrigin.read(folder), pictures_sha256=files_sha256(files))
    return ImageSource(made, FolderImages(files, config.batch_size, config.pictures_per_prompt))


def _setting(
    config: ScoreConfig,
    recipe: Recipe,
    reference: DataSet,
    pictures: int,
    files: Sequence[ImageFile],
    seed: int,
    device: str,
) -> Setting:
    metrics, count = config.metrics or recipe.metrics, len(files) // config.pictures_per_prompt
    data = describe_reference(reference, pictures, metrics) | {
        "prompt_ids_sha256": digest([picture.id for picture in files]),
        "captions_sha256": digest([picture.caption for picture in files]),
    }
    resolved = {
        "recipe": recipe.model_dump(mode="json"),
        "num_images": len(files),
        "reference_pictures": pictures,
        "metrics": list(metrics),
        "seed": seed,
    }
    protocol = config.model_dump(mode="json") | resolved
    return Setting(
        protocol=protocol,
        shared={key: value for key, value in protocol.items() if key not in ("folders", "batch_size")},
        recipe=recipe,
        reference=reference,
        reference_pictures=pictures,
        data=data,
        count=count,
        batch_size=config.batch_size,
        seed=seed,
        device=device,
    )
