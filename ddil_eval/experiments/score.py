"""Folders of images, made by any program, against one reference. The recipes and metrics are those of systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ddil_core.data.base import DataSet
from ddil_core.data.captioned import ImageFile, files_sha256, name_some
from ddil_core.data.datasets import DATASETS, open_data
from ddil_core.data.folder import ImageFiles
from ddil_core.support.errors import WrongCommand
from ddil_core.support.lock import held_by_main
from ddil_core.support.paths import user_path
from ddil_core.support.protocol import Strict, renamed
from ddil_eval.experiments.engine import differences_from_first, measure_systems
from ddil_eval.experiments.image_sizes import ImageSizes, require_sizes
from ddil_eval.experiments.image_sources import FolderImages, ImageOrigin, ImageSource, open_image_folder
from ddil_eval.experiments.prompts import require_enough
from ddil_eval.experiments.reference_images import (
    check_reference,
    describe_reference,
    number_of,
    refuse_other_reference,
)
from ddil_eval.experiments.rows import Setting, System
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.recipes import Recipe, load_recipe, recipe_for
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record, digest

NOT_HASHED = frozenset({"experiment", "folders", "batch_size"})
"""Keys of the configuration that no row's numbers depend on."""


class ScoreConfig(Strict):
    """Folders of images against one reference, as data. Settings that are None come from the recipe.

    Attributes:
        experiment: The name of the experiment.
        folders: The folders of images.
        reference: A folder, or the reference of a data set.
        recipe: The name of the recipe. Defaults to the recipe of the reference.
        num_images: The number of images of each folder. Defaults to all images.
        images_per_prompt: The number of images that each prompt has; they follow one another.
        reference_images: The number of images of the reference. Defaults to all images of a folder, or the recipe's
            number.
        metrics: The names of the metrics.
        batch_size: The number of images in a batch.
        seed: The seed of the jackknife's groups. Defaults to the seed that the images were made with, where the folder
            says it: the intervals are then those of the first measurement.
    """

    experiment: Literal["score"] = "score"
    folders: tuple[str, ...] = Field(min_length=1)
    reference: str
    recipe: str | None = None
    num_images: int | None = Field(default=None, ge=4)
    images_per_prompt: int = renamed("images_per_prompt", default=1, ge=1)
    reference_images: int | None = renamed("reference_images", default=None, ge=2)
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


@dataclass(frozen=True)
class _Reference:
    """What all folders are compared with."""

    data: DataSet
    recipe: Recipe
    num_images: int
    sizes: ImageSizes


def score_folders(config: ScoreConfig, out: Path, device: str = "cpu") -> list[Record]:
    """Measure every folder, and save its record below ``out``.

    Folders of images with the same ids are compared image by image, each later folder with the first.

    Raises:
        WrongCommand: a folder or the reference does not fit. All are checked before any image is scored.
        DdilError: a metric lacks its weights, or an image is missing or damaged.
    """
    reference = _open_reference(config)
    metrics = config.metrics or reference.recipe.metrics
    paths = {folder: user_path(folder, "the folder") for folder in config.folders}
    files = {}
    for folder, path in paths.items():
        files[folder], surveyed = open_image_folder(path, config.num_images)
        _require_captions(folder, files[folder], metrics)
        _require_groups(folder, files[folder], config.images_per_prompt)
        captions = [file.caption or "" for file in files[folder]]
        sizes = ImageSizes.of(surveyed, f"the images of {path}")
        require_sizes(sizes, reference.sizes, reference.recipe, metrics, captions)
        require_enough(len(files[folder]) // config.images_per_prompt, f"the folder {folder}")
    extractors = Extractors(metrics, device, reference.recipe, config.images_per_prompt)
    records = []
    with held_by_main(out):
        for names in _same_prompts(files, metrics):
            setting = _setting(config, reference, files[names[0]], _seed(config, paths[names[0]]), device)
            rows = [System(name, partial(_open, paths[name], files[name], config)) for name in names]
            records += measure_systems(rows, differences_from_first(names), extractors, setting, out)
    return records


def _open_reference(config: ScoreConfig) -> _Reference:
    """Open the reference. Its number of images defaults to all images of a folder, or to the recipe's number."""
    place = config.reference if config.reference.partition(":")[0] in DATASETS else f"folder:{config.reference}"
    recipe = load_recipe(config.recipe or recipe_for(place))
    refuse_other_reference(recipe, place)
    data = open_data(place)
    everything = len(data.files) if isinstance(data, ImageFiles) else recipe.reference.images
    count = number_of(config.reference_images or everything, data)
    if count < 2:
        raise WrongCommand(f"the reference {config.reference} has {count} image, and a set needs at least 2")
    sizes = check_reference(data, count, recipe, config.metrics or recipe.metrics)
    return _Reference(data, recipe, count, sizes)


def _same_prompts(files: Mapping[str, Sequence[ImageFile]], metrics: Sequence[str]) -> list[list[str]]:
    """Group the folders with the same ids of images, and the same captions where a metric reads them.

    The groups and their folders have the order given.
    """
    reads = bool(_reading(metrics))
    groups: dict[str, list[str]] = {}
    for folder, images in files.items():
        same = digest([[image.id, image.caption if reads else None] for image in images])
        groups.setdefault(same, []).append(folder)
    return list(groups.values())


def _reading(metrics: Sequence[str]) -> list[str]:
    """Return the metrics that read captions."""
    return [name for name in metrics if name in METRICS and METRICS[name].network.reads_captions]


def _require_captions(folder: str, files: Sequence[ImageFile], metrics: Sequence[str]) -> None:
    """Refuse metrics that read captions where images have none."""
    reading = _reading(metrics)
    silent = [file.path.name for file in files if file.caption is None]
    if reading and silent:
        raise WrongCommand(
            f"{', '.join(reading)} needs captions, and {len(silent):,} of {len(files):,} images of {folder} have none "
            f"({name_some(silent)}); put a .txt beside each or an index.jsonl, or choose other --metrics"
        )


def _require_groups(folder: str, files: Sequence[ImageFile], number: int) -> None:
    """Refuse a folder that does not hold ``number`` images of each prompt, one after another."""
    if len(files) % number:
        raise WrongCommand(
            f"the {len(files):,} images of {folder} are not {number} of each prompt; add the missing images, or change "
            "images_per_prompt"
        )
    for start in range(0, len(files), number):
        first, *others = files[start : start + number]
        other = next((file for file in others if file.caption != first.caption), None)
        if other is not None:
            raise WrongCommand(
                f"{first.path.name} and {other.path.name} of {folder} have two captions, {first.caption!r} and "
                f"{other.caption!r}; each {number} images that follow one another must have one prompt: put them "
                "in that order"
            )


def _seed(config: ScoreConfig, folder: Path) -> int:
    """Return the seed of the jackknife's groups: the given one, else the one of the folder's images, else 0."""
    if config.seed is not None:
        return config.seed
    return ImageOrigin.read(folder).seed or 0


def _open(folder: Path, files: Sequence[ImageFile], config: ScoreConfig) -> ImageSource:
    origin = replace(ImageOrigin.read(folder), pictures_sha256=files_sha256(files))
    return ImageSource(origin, FolderImages(files, config.batch_size, config.images_per_prompt))


def _setting(config: ScoreConfig, reference: _Reference, files: Sequence[ImageFile], seed: int, device: str) -> Setting:
    """Collect what the rows of one group of folders share; ``files`` are the images of its first folder."""
    recipe, images = reference.recipe, reference.num_images
    metrics = config.metrics or recipe.metrics
    protocol = config.model_dump(mode="json") | {
        "recipe": recipe.model_dump(mode="json"),
        "num_images": len(files),
        "reference_pictures": images,
        "metrics": list(metrics),
        "seed": seed,
    }
    return Setting(
        protocol=protocol,
        not_hashed=NOT_HASHED,
        recipe=recipe,
        reference=reference.data,
        num_reference_images=images,
        data=describe_reference(reference.data, images, metrics)
        | {
            "prompt_ids_sha256": digest([file.id for file in files]),
            "captions_sha256": digest([file.caption for file in files]),
        },
        count=len(files) // config.images_per_prompt,
        batch_size=config.batch_size,
        seed=seed,
        device=device,
    )
