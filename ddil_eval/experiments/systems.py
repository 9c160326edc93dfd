"""Systems side by side on the same prompts and seeds, with their paired differences (Table 1's form).

A comparison is prompts, systems and a recipe, as data. Each system is sampled as it was made for, unless its row says
otherwise. What is not here is said before any picture is made; the rest can be measured all the same.
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
from ddil_core.diffusion.parameterization import ReflectionMode
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.generate import resolve_sampling, sampling_warnings
from ddil_core.models.model import Model, load_model
from ddil_core.models.references import check_files, resolve
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import user_path
from ddil_core.support.progress import warn
from ddil_core.support.protocol import GuidanceScale, Strict
from ddil_eval.experiments.engine import measure_systems
from ddil_eval.experiments.image_sources import GeneratedImages, ImageOrigin, ImageSource, ImageWriter, slug
from ddil_eval.experiments.prompts import Prompts, choose_prompts
from ddil_eval.experiments.reference_images import check_reference, describe_reference, refuse_other_reference
from ddil_eval.experiments.rows import Setting, System
from ddil_eval.features.extraction import RecipeExtractors, require_several
from ddil_eval.features.recipes import Recipe, load_recipe, recipe_for
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record
from ddil_eval.report.tables import paper_rows

FORMER_NAMES = ("coco", "compare")
"""Names that the experiment had; protocols that hold them are still read."""


class SystemConfig(Strict):
    """A row: its name in the table and the model's reference; solver, steps, guidance and reflection where they are not the
    model's own.

    ``paper`` is its name in the paper's Table 1 or 5, ``provide`` what to do where the model is not here.
    """

    name: str = Field(min_length=1)
    model: str
    steps: int | None = Field(default=None, ge=1)
    solver: str | None = None
    guidance_scale: GuidanceScale | None = None
    reflection: ReflectionMode | None = None
    paper: str | None = None
    provide: str | None = None


def refuse_names(systems: Sequence[SystemConfig], differences: Sequence[tuple[str, str]]) -> None:
    """Refuse two rows of one name, and differences of rows that there are not.

    Raises:
        ValueError: there are such.
    """
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two systems are named {twice[0]!r}")
    unknown = [name for pair in differences for name in pair if name not in names]
    if unknown:
        raise ValueError(f"the differences name {unknown[0]!r}, which is none of the systems {', '.join(names)}")


class SystemsConfig(Strict):
    """A comparison as data. ``differences`` are pairs of names, the first less the second.

    What is left out comes from the recipe, and the recipe from the data set. ``prompts`` is the path of a list. With more
    ``pictures_per_prompt`` than one, metrics that compare the pictures of a prompt see all of them, the others the first.
    """

    experiment: Literal["systems"] = "systems"
    data: str = "shapes"
    recipe: str | None = None
    prompts: str | None = None
    systems: tuple[SystemConfig, ...] = Field(min_length=1)
    differences: tuple[tuple[str, str], ...] = ()
    num_prompts: int | None = Field(default=None, ge=4)
    pictures_per_prompt: int = Field(default=1, ge=1)
    reference_pictures: int | None = Field(default=None, ge=2)
    metrics: tuple[str, ...] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("experiment", mode="before")
    @classmethod
    def _has_its_present_name(cls, experiment: object) -> object:
        return "systems" if experiment in FORMER_NAMES else experiment

    @model_validator(mode="after")
    def _names_fit(self) -> SystemsConfig:
        refuse_names(self.systems, self.differences)
        paper = [(system.paper, system.steps) for system in self.systems if system.paper is not None]
        absent = [row for row in paper if row not in paper_rows()]
        if absent:
            raise ValueError(f"the paper's Table 1 has no row {absent[0][0]!r} of {absent[0][1]} steps")
        return self


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison with all that it needs found; ``absent`` names what is not here, with an error that says what to provide."""

    config: SystemsConfig
    recipe: Recipe
    data: DataSet | None
    prompts: Prompts | None
    systems: tuple[SystemConfig, ...]
    metrics: tuple[str, ...]
    absent: dict[str, DdilError]

    @property
    def possible(self) -> bool:
        """Whether anything can be measured."""
        return self.data is not None and self.prompts is not None and bool(self.systems and self.metrics)

    def require_all(self) -> None:
        """Raise what is absent, if anything is, in one sentence."""
        if not self.absent:
            return
        (name, error), *others = self.absent.items()
        if not others and not name.startswith("metric "):
            raise error  # a model or the data, which it names itself
        raise DdilError("; ".join(f"{name}: {error}" for name, error in self.absent.items()))


def plan_comparison(config: SystemsConfig) -> ComparisonPlan:
    """Find what a comparison needs; nothing heavy is opened.

    Raises:
        WrongCommand: a recipe, a metric or a solver that is not known, or a data set that is another recipe's reference.
    """
    recipe = load_recipe(config.recipe or recipe_for(config.data))
    refuse_other_reference(recipe, config.data)
    unknown = [name for name in config.metrics or recipe.metrics if name not in METRICS]
    if unknown:
        raise WrongCommand(f"the metric {unknown[0]!r} is not known; it may be one of {', '.join(METRICS)}")
    require_several(config.metrics or recipe.metrics, config.pictures_per_prompt)
    for system in config.systems:
        if system.solver is not None:
            SOLVERS.find(system.solver)
    absent: dict[str, DdilError] = {}
    data, prompts = None, None
    try:
        opened = open_data(config.data)
        path = None if config.prompts is None else user_path(config.prompts, "the list of prompts")
        chosen = choose_prompts(opened, config.num_prompts or recipe.images, path)
        if any(METRICS[name].kind == "set" for name in config.metrics or recipe.metrics):
            check_reference(opened, config.reference_pictures or recipe.reference.pictures)
        data, prompts = opened, chosen
    except DdilError as error:
        absent[f"data {config.data}"] = error
    metrics = []
    for name in config.metrics or recipe.metrics:
        problem = METRICS[name].missing()
        if problem is None:
            metrics.append(name)
        else:
            absent[f"metric {name}"] = DdilError(problem)
    systems = []
    for system in config.systems:
        try:
            check_files(resolve(system.model), system.model)
            systems.append(system)
        except DdilError as error:
            hint = f"the model {system.model!r} is not here; {system.provide}"
            absent[system.name] = error if system.provide is None else type(error)(hint)
    return ComparisonPlan(config, recipe, data, prompts, tuple(systems), tuple(metrics), absent)


def compare(config: SystemsConfig, out: Path, device: str = "cpu", *, save_images: bool = False) -> list[Record]:
    """Measure every system and every difference, and save their records below ``out``.

    Raises:
        DdilError: something is not here; said before any picture is made.
    """
    found = plan_comparison(config)
    found.require_all()
    return measure_plan(found, out, device, save_images=save_images)


def measure_plan(found: ComparisonPlan, out: Path, device: str = "cpu", *, save_images: bool = False) -> list[Record]:
    """Measure what a plan found, and save its records below ``out``; ``save_images`` keeps the pictures in ``out/images``.

    Raises:
        DdilError: nothing can be measured.
    """
    config = found.config
    if found.data is None or found.prompts is None or not found.possible:
        raise DdilError("nothing can be measured: provide what is named above, and run the same command again")
    extractors = RecipeExtractors(found.metrics, device, found.recipe, config.pictures_per_prompt)
    keep = out if save_images else None
    rows = [
        System(s.name, partial(_open, s, found.prompts, config, device, keep), {"paper": s.paper} if s.paper else {})
        for s in found.systems
    ]
    here = {system.name for system in found.systems}
    differences = [(a, b) for a, b in config.differences if {a, b} <= here]
    return measure_systems(rows, differences, extractors, describe(found, found.data, found.prompts, device), out)


def describe(found: ComparisonPlan, data: DataSet, prompts: Prompts, device: str) -> Setting:
    """What all rows share, for their records."""
    config, recipe = found.config, found.recipe
    count, pictures = len(prompts.prompts), config.reference_pictures or recipe.reference.pictures
    resolved = {
        "recipe": recipe.model_dump(mode="json"),
        "num_prompts": count,
        "reference_pictures": pictures,
        "metrics": list(found.metrics),
    }
    protocol = config.model_dump(mode="json") | resolved
    own = {"systems", "differences", "batch_size", "experiment"}  # no row's numbers depend on these
    return Setting(
        protocol=protocol,
        shared={key: value for key, value in protocol.items() if key not in own},
        recipe=recipe,
        reference=data,
        reference_pictures=pictures,
        data=describe_reference(data, pictures, found.metrics) | prompts.described(),
        count=count,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
    )


def _open(system: SystemConfig, prompts: Prompts, config: SystemsConfig, device: str, out: Path | None) -> ImageSource:
    """Load a system and say how it is sampled."""
    model = load_model(system.model, device)
    sampling = resolve_sampling(model, system.steps, system.solver, system.guidance_scale, system.reflection)
    for sentence in sampling_warnings(model, [prompt.text for prompt in prompts.prompts], sampling):
        warn(f"{system.name}: {sentence}")
    made, number = how_made(model, sampling, config.seed), config.pictures_per_prompt
    keeper = None if out is None else ImageWriter(out / "images" / slug(system.name), made, prompts.prompts, number)
    return ImageSource(
        made, GeneratedImages(model, prompts.prompts, sampling, config.seed, config.batch_size, number), keeper
    )


def how_made(model: Model, sampling: Sampling, seed: int) -> ImageOrigin:
    """What a record says of a model's pictures."""
    schedule = model.denoiser.schedule
    calls = SOLVERS.find(sampling.solver).calls(schedule, sampling.transitions(schedule))
    evaluations = calls * model.guided(sampling.guidance_scale).nfe
    return ImageOrigin(
        reference=model.reference,
        weights_sha256=model.weights_sha256(),
        solver=sampling.solver,
        grid=tuple(sampling.times(schedule)),
        guidance_scale=sampling.guidance_scale,
        reflection=sampling.reflection,
        nfe=float(evaluations),
        seed=seed,
    )
