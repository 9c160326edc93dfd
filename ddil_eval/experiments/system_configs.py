"""The systems that a configuration names: their sampling, and whether their files are on this machine."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import Field, model_validator

from ddil_core.diffusion.parameterization import ReflectionMode
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.generate import announce_sampling, cut_warnings, resolve_sampling, setting_warnings
from ddil_core.models.model import Model, outline
from ddil_core.models.references import resolve
from ddil_core.models.sampling import Sampling, assumed_guidance, sampling_line
from ddil_core.support import ranks
from ddil_core.support.compute import Compute, DtypeName
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.progress import note, warn
from ddil_core.support.protocol import GuidanceScale, Strict
from ddil_core.support.size import WantedSize
from ddil_core.support.text import one_line
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.experiments.training_seeds import for_each_seed, require_seeds
from ddil_eval.report.paper_numbers import paper_rows

Row = TypeVar("Row", bound="SystemConfig")
NOTHING_TO_MEASURE = "nothing can be measured: provide what is named above, and run the same command again"


class SystemConfig(Strict):
    """A row of a comparison: a model, and how it is sampled. Settings left out are the model's own.

    Attributes:
        name: The name in tables.
        model: The model's reference.
        steps: The number of solver steps.
        solver: The name of the solver.
        guidance_scale: The guidance scale g; 1 is no guidance.
        reflection: How x̂ is kept inside the range of the data.
        dtype: The number format of the row's model. Left out, it is the protocol's, as in the next two.
        tf32: Whether a GPU may use TF32.
        compile: Whether the networks are compiled.
        height: The height of the images in pixels. Left out, it is the protocol's, as in the next.
        width: The width of the images in pixels.
        paper: The name of the row in the paper's Table 1 or 5.
        provide: What a user does to get a model that is missing.
    """

    name: str = Field(min_length=1)
    model: str
    steps: int | None = Field(default=None, ge=1)
    solver: str | None = None
    guidance_scale: GuidanceScale | None = None
    reflection: ReflectionMode | None = None
    dtype: DtypeName | None = None
    tf32: bool | None = None
    compile: bool | None = None
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    paper: str | None = None
    provide: str | None = None

    @property
    def models(self) -> dict[str, str]:
        """The reference of the row's model, by the name of the system."""
        return {self.name: self.model}

    def compute(self, shared: Compute) -> Compute:
        """Return how the row's model computes: its own settings over those that all rows share."""
        return shared.override(dtype=self.dtype, tf32=self.tf32, compile=self.compile)

    def size(self, shared: WantedSize) -> WantedSize:
        """Return the row's size: its own sides over those that all rows share."""
        height = shared["height"] if self.height is None else self.height
        return WantedSize(height=height, width=shared["width"] if self.width is None else self.width)


class SeededSystemConfig(SystemConfig):
    """A row that may hold students of several training seeds. Its numbers are their mean.

    Attributes:
        training_seeds: The number of students. ``{training_seed}`` in the model's reference stands for their seeds: 0,
            1 and so on. None for one model, whose reference is complete.
    """

    training_seeds: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _reference_names_its_seed(self) -> SeededSystemConfig:
        require_seeds(self.model, self.training_seeds, f"the model {self.model!r} of {self.name!r}")
        return self

    @property
    def models(self) -> dict[str, str]:
        """The references of the row's models, by the names of its systems."""
        if self.training_seeds is None:
            return {self.name: self.model}
        models = for_each_seed(self.model, self.training_seeds)
        return {f"{self.name}, training seed {seed}": model for seed, model in enumerate(models)}

    def sampled(self, student: Model) -> Sampling:
        """Return how a student of the row is sampled. Warn of nothing, since ``students_warnings`` does."""
        scale = student.sampling.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return resolve_sampling(student, self.steps, self.solver, scale, self.reflection)


def system_rows(
    models: Sequence[str],
    *,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    reflection: str | None = None,
) -> list[dict[str, object]]:
    """Return a row for each model, all with the same sampling. What is None is left to each model.

    Args:
        models: References of models; each is the name of its row.
        steps: The number of solver steps.
        solver: The name of the solver.
        guidance_scale: The guidance scale.
        reflection: How x̂ is kept inside the range of the data.
    """
    given = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale, "reflection": reflection}
    sampling = {key: value for key, value in given.items() if value is not None}
    return [{"name": model, "model": model, **sampling} for model in models]


def refuse_names(systems: Sequence[SystemConfig], differences: Sequence[tuple[str, str]], table: str) -> None:
    """Refuse names that are taken twice or unknown: of systems, in differences, and in a table of the paper.

    Raises:
        ValueError: a name does not fit.
    """
    names = [system.name for system in systems]
    students = [name for system in systems for name in system.models]
    twice = sorted({name for name in students if students.count(name) > 1})
    if twice:
        raise ValueError(f"two systems are named {twice[0]!r}")
    of_pairs = {f"{a} − {b}" for a, b in itertools.permutations(names, 2)}
    if of_difference := sorted(of_pairs & {*names}):
        raise ValueError(f"the system {of_difference[0]!r} is named like the difference of two others; rename it")
    unknown = [name for pair in differences for name in pair if name not in names]
    if unknown:
        raise ValueError(f"the differences name {unknown[0]!r}, which is none of the systems {', '.join(names)}")
    paper = [(system.paper, system.steps) for system in systems if system.paper is not None]
    absent = [row for row in paper if row not in paper_rows(table)]
    if absent:
        title = table.replace("table", "Table ")
        raise ValueError(f"the paper's {title} has no row {absent[0][0]!r} of {absent[0][1]} steps")


def find_systems(systems: Iterable[Row], look: Callable[[str], object]) -> tuple[tuple[Row, ...], dict[str, DdilError]]:
    """Split systems into those that are here and those that are absent.

    Args:
        systems: The rows.
        look: Raises DdilError where the files of a reference are not here.

    Returns:
        The systems that are here, and for each absent one the error that says what to provide.
    """
    here, absent = [], {}
    for system in systems:
        try:
            for model in system.models.values():
                look(model)
            here.append(system)
        except DdilError as error:
            hint = f"the model {model!r} is not here; {system.provide}"
            absent[system.name] = error if system.provide is None else type(error)(hint)
    return tuple(here), absent


def report_absent(absent: Mapping[str, DdilError]) -> None:
    """Print on stderr what is not here, one line each; of several processes the main one does."""
    if ranks.is_main():
        for name, error in absent.items():
            print(f"not here: {one_line(f'{name}: {error}')}", file=sys.stderr)


def sampling_of(system: SystemConfig, model: Model, prompts: Sequence[str]) -> Sampling:
    """Return how a system is sampled. Print it, and warn of what a user should know about it."""
    sampling = resolve_sampling(model, system.steps, system.solver, system.guidance_scale, system.reflection)
    announce_sampling(model, prompts, sampling, system.name)
    return sampling


def students_warnings(row: SeededSystemConfig, size: WantedSize) -> list[str]:
    """Compare how the students of a row are sampled. Only their configurations are read, and no weight.

    Args:
        row: The row. The files of its students are here.
        size: The size of images that all rows share.

    Returns:
        One warning for each thing that a user should know, however many students it holds for.

    Raises:
        WrongCommand: the students are sampled in different ways, so that their mean would be of nothing.
    """
    students = {name: outline(model, resolve(model), **row.size(size)) for name, model in row.models.items()}
    used = {name: row.sampled(student) for name, student in students.items()}
    ways = [image_origin(students[name], sampling, 0, with_weights=False) for name, sampling in used.items()]
    if any(replace(way, reference="") != replace(ways[0], reference="") for way in ways):
        raise WrongCommand(
            f"the students of the row {row.name!r} are sampled in different ways; say its steps, solver and "
            "guidance_scale"
        )
    holds_for: dict[str, list[str]] = {}
    for name, student in students.items():
        sentences = setting_warnings(student, used[name], row.model)
        if student.guidance_assumed and row.guidance_scale is None:
            sentences.append(assumed_guidance(row.model, used[name].guidance_scale))
        for sentence in sentences:
            holds_for.setdefault(sentence, []).append(name)
    return [f"{_named(row, names)}: {sentence}" for sentence, names in holds_for.items()]


def _named(row: SeededSystemConfig, names: Sequence[str]) -> str:
    """Name some students of a row: the row where they are all, or the first and the number of the others."""
    if len(names) == len(row.models):
        return row.name
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def announce_row(row: SeededSystemConfig, warnings: Sequence[str], first: Model, prompts: Sequence[str]) -> None:
    """Print how the students of a row are sampled, after warnings, once for all of them.

    Args:
        row: The row.
        warnings: What ``students_warnings`` returns.
        first: The model of the first student. The others have its tokenizers.
        prompts: The prompts.
    """
    for sentence in [*warnings, *(f"{row.name}: {sentence}" for sentence in cut_warnings(first, prompts))]:
        warn(sentence)
    note(sampling_line(row.name, row.sampled(first).effective()))


def image_origin(model: Model, sampling: Sampling, seed: int, *, with_weights: bool = True) -> ImageOrigin:
    """Return what a record says of the images that a model generates; ``with_weights``: with the weights' hash."""
    schedule = model.denoiser.schedule
    calls = SOLVERS.find(sampling.solver).calls(schedule, sampling.transitions(schedule))
    evaluations = calls * model.evaluations(sampling.guidance_scale)
    return ImageOrigin(
        reference=model.reference,
        weights_sha256=model.weights_sha256() if with_weights else None,
        solver=sampling.solver_text,
        grid=tuple(sampling.times(schedule)),
        guidance_scale=sampling.guidance_scale,
        reflection=sampling.reflection,
        nfe=float(evaluations),
        seed=seed,
        compute=model.compute,
        size=model.image_size if model.asked_size else None,
    )
