"""Systems side by side on the same prompts and seeds, with their paired differences: the form of the paper's Table 1.

A comparison is data: prompts, systems and a recipe. Each system is sampled as its model was made for, unless its row
says otherwise. What is missing is named before any image is made, and the rest can still be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ddil_core.data.base import DataSet
from ddil_core.data.datasets import open_data
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.image_size import image_size
from ddil_core.models.model import load_model
from ddil_core.models.references import check_files, resolve
from ddil_core.support.compute import ComputeKeys
from ddil_core.support.errors import DdilError, Missing, WrongCommand
from ddil_core.support.lock import held_by_main
from ddil_core.support.paths import user_path
from ddil_core.support.protocol import renamed
from ddil_core.support.size import SizeKeys
from ddil_eval.experiments.engine import measure_systems
from ddil_eval.experiments.image_sizes import NO_SIZES, ImageSizes, require_sizes
from ddil_eval.experiments.image_sources import GeneratedImages, ImageSource, ImageWriter, slug
from ddil_eval.experiments.prompts import Prompts, choose_prompts, require_enough
from ddil_eval.experiments.reference_images import (
    check_reference,
    describe_reference,
    number_of,
    refuse_other_reference,
)
from ddil_eval.experiments.rows import Setting, System
from ddil_eval.experiments.system_configs import (
    NOTHING_TO_MEASURE,
    SeededSystemConfig,
    announce_row,
    find_systems,
    image_origin,
    refuse_names,
    report_absent,
    sampling_of,
    students_warnings,
)
from ddil_eval.features.extraction import Extractors, require_several
from ddil_eval.features.recipes import Recipe, load_recipe, recipe_for
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record

FORMER_NAMES = ("coco", "compare")
"""Names that the experiment had; protocols that hold them are still read."""
NOT_HASHED = frozenset(
    {"systems", "differences", "skip_prompts", "batch_size", "experiment", *ComputeKeys.model_fields}
    | SizeKeys.model_fields.keys()
)
"""Keys of the configuration that no row's numbers depend on, or that the record of a row names itself."""


class SystemsConfig(ComputeKeys, SizeKeys):
    """A comparison of systems as data. What is None comes from the recipe, and the recipe from the data set.

    The keys of ``ComputeKeys`` say how its models compute, and those of ``SizeKeys`` which images they draw; a row may
    have its own.

    Attributes:
        experiment: The name of the experiment.
        data: The reference of the data set.
        recipe: The name of the recipe.
        prompts: The path of a list of prompts, in place of the data set's own.
        systems: The rows.
        differences: Pairs of names; the second is subtracted from the first.
        num_prompts: The number of prompts.
        skip_prompts: How many prompts come before them, and are not measured. Settings should be chosen on prompts that
            no table is measured on.
        images_per_prompt: The number of images of each prompt. Metrics that compare the images of a prompt take all
            of them; other metrics take the first.
        reference_images: The number of images of the data set that generated ones are compared with.
        metrics: The names of the metrics.
        batch_size: The number of images in a batch.
        seed: The seed of the noise, and of the jackknife's groups.
    """

    experiment: Literal["systems"] = "systems"
    data: str = "shapes"
    recipe: str | None = None
    prompts: str | None = None
    systems: tuple[SeededSystemConfig, ...] = Field(min_length=1)
    differences: tuple[tuple[str, str], ...] = ()
    num_prompts: int | None = Field(default=None, ge=4)
    skip_prompts: int = Field(default=0, ge=0)
    images_per_prompt: int = renamed("images_per_prompt", default=1, ge=1)
    reference_images: int | None = renamed("reference_images", default=None, ge=2)
    metrics: tuple[str, ...] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("experiment", mode="before")
    @classmethod
    def _has_its_present_name(cls, experiment: object) -> object:
        return "systems" if experiment in FORMER_NAMES else experiment

    @model_validator(mode="after")
    def _names_fit(self) -> SystemsConfig:
        refuse_names(self.systems, self.differences, "table1")
        return self


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison, and which of its parts are on this machine.

    Attributes:
        config: The configuration.
        recipe: Its recipe.
        data: The data set, if it is here.
        prompts: The prompts, if they are here.
        systems: The systems that are here.
        metrics: The metrics that can be computed here.
        absent: What is not here, by name, each with an error that says what to provide.
        warnings: Of rows of several training seeds, what a user should know of how their students are sampled.
    """

    config: SystemsConfig
    recipe: Recipe
    data: DataSet | None
    prompts: Prompts | None
    systems: tuple[SeededSystemConfig, ...]
    metrics: tuple[str, ...]
    absent: dict[str, DdilError]
    warnings: dict[str, list[str]]

    def require_all(self) -> None:
        """Refuse to go on where anything is absent.

        Raises:
            DdilError: one thing is absent; the message names it.
            Missing: several things are absent; the message names all of them.
        """
        if not self.absent:
            return
        (name, error), *others = self.absent.items()
        if others:
            raise Missing([f"{name}: {error}" for name, error in self.absent.items()])
        if name.startswith("metric "):
            raise DdilError(f"{name}: {error}")
        raise error  # the error of a model or of the data names it already


def plan_comparison(config: SystemsConfig) -> ComparisonPlan:
    """Look for all that a comparison needs. No network is loaded.

    Raises:
        WrongCommand: a recipe, a metric or a solver is unknown, the data set is the reference of another recipe, a
            metric does not take a model's images (see ``require_sizes``), or the students of a row are sampled in
            different ways.
    """
    recipe = load_recipe(config.recipe or recipe_for(config.data))
    refuse_other_reference(recipe, config.data)
    wanted = config.metrics or recipe.metrics
    for name in wanted:
        METRICS.find(name)
    require_several(wanted, config.images_per_prompt)
    for system in config.systems:
        if system.solver is not None:
            SOLVERS.find(system.solver)
    absent: dict[str, DdilError] = {}
    data, prompts, reference_sizes = None, None, None
    try:
        opened = open_data(config.data)
        path = None if config.prompts is None else user_path(config.prompts, "the list of prompts")
        chosen = choose_prompts(opened, config.num_prompts or recipe.images, path, config.skip_prompts)
        if any(METRICS[name].kind == "set" for name in wanted):
            number = number_of(config.reference_images or recipe.reference.images, opened)
            reference_sizes = check_reference(opened, number, recipe, wanted)
        data, prompts = opened, chosen
    except DdilError as error:
        absent[f"data {config.data}"] = error
    problems = {name: METRICS[name].missing() for name in wanted}
    metrics = tuple(name for name, problem in problems.items() if problem is None)
    absent |= {f"metric {name}": DdilError(problem) for name, problem in problems.items() if problem is not None}
    systems, absent_systems = find_systems(config.systems, lambda model: check_files(resolve(model), model))
    if prompts is not None:
        require_enough(len(prompts.prompts), config.prompts or config.data)
        captions = [prompt.text for prompt in prompts.prompts]
        for system in systems:
            for model in system.models.values():
                drawn = ImageSizes.drawn(model, image_size(model, **system.size(config.size)))
                require_sizes(drawn, reference_sizes or NO_SIZES, recipe, metrics, captions)
    seeded = (system for system in systems if system.training_seeds is not None)
    warnings = {system.name: students_warnings(system, config.size) for system in seeded}
    return ComparisonPlan(config, recipe, data, prompts, systems, metrics, absent | absent_systems, warnings)


def compare_systems(
    config: SystemsConfig, out: Path, device: str = "cpu", *, save_images: bool = False, allow_absent: bool = False
) -> list[Record]:
    """Measure every system and every difference, and save their records below ``out``.

    Args:
        config: The comparison.
        out: The results folder; no other command may use it meanwhile.
        device: The device of this process.
        save_images: Keep the images in ``out/images``.
        allow_absent: Report what is not here, and measure the rest. Without it, anything missing is an error.

    Raises:
        DdilError: something is missing, or nothing can be measured.
    """
    plan = plan_comparison(config)
    if allow_absent:
        report_absent(plan.absent)
    else:
        plan.require_all()
    with held_by_main(out):
        return measure_comparison(plan, out, device, save_images=save_images)


def measure_comparison(
    plan: ComparisonPlan, out: Path, device: str = "cpu", *, save_images: bool = False
) -> list[Record]:
    """Measure what is here of a comparison, and save its records below ``out``.

    Raises:
        DdilError: nothing can be measured.
    """
    if plan.data is None or plan.prompts is None or not plan.systems or not plan.metrics:
        raise DdilError(NOTHING_TO_MEASURE)
    config, prompts, folder = plan.config, plan.prompts, out / "images" if save_images else None
    extractors = Extractors(plan.metrics, device, plan.recipe, config.images_per_prompt)
    rows = [
        System(
            name,
            partial(_open, row, name, prompts, config, device, folder, plan.warnings.get(row.name, [])),
            {"paper": row.paper} if row.paper else {},
            row.name,
        )
        for row in plan.systems
        for name in row.models
    ]
    if folder is not None:
        _require_own_folders([row.name for row in rows])
    here = {system.name for system in plan.systems}
    differences = [(a, b) for a, b in config.differences if {a, b} <= here]
    return measure_systems(rows, differences, extractors, _setting(plan, plan.data, prompts, device), out)


def _setting(plan: ComparisonPlan, data: DataSet, prompts: Prompts, device: str) -> Setting:
    config, recipe = plan.config, plan.recipe
    count = len(prompts.prompts)
    images = number_of(config.reference_images or recipe.reference.images, data)
    protocol = config.model_dump(mode="json") | {
        "recipe": recipe.model_dump(mode="json"),
        "num_prompts": count,
        "reference_pictures": images,
        "metrics": list(plan.metrics),
    }
    return Setting(
        protocol=protocol,
        not_hashed=NOT_HASHED,
        recipe=recipe,
        reference=data,
        num_reference_images=images,
        data=describe_reference(data, images, plan.metrics) | prompts.described(),
        count=count,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
    )


def _require_own_folders(names: Sequence[str]) -> None:
    """Refuse names whose kept images would share a folder."""
    by_folder: dict[str, str] = {}
    for name in names:
        other = by_folder.setdefault(slug(name), name)
        if other != name:
            raise WrongCommand(
                f"the images of {other!r} and {name!r} would share the folder images/{slug(name)}; give the rows names "
                "that differ in their letters or digits (in a protocol), or leave out --save-images"
            )


def _open(
    row: SeededSystemConfig,
    name: str,
    prompts: Prompts,
    config: SystemsConfig,
    device: str,
    folder: Path | None,
    warnings: Sequence[str],
) -> ImageSource:
    """Load the system ``name`` of a row, and open a folder for its images where they are kept."""
    compute, size, number = row.compute(config.compute), row.size(config.size), config.images_per_prompt
    model = load_model(row.models[name], device, compute=compute, **size)
    texts = [prompt.text for prompt in prompts.prompts]
    if row.training_seeds is None:
        sampling = sampling_of(row, model, texts)
    else:
        sampling = row.sampled(model)
        if name == next(iter(row.models)):
            announce_row(row, warnings, model, texts)
    origin = image_origin(model, sampling, config.seed)
    writer = None if folder is None else ImageWriter(folder / slug(name), origin, prompts.prompts, number)
    images = GeneratedImages(model, prompts.prompts, sampling, config.seed, config.batch_size, number)
    return ImageSource(origin, images, writer)
