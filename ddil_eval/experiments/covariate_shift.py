"""The covariate-shift analysis: Tables 2, 3 and 4, the two pure runs, Figure 2, and the factorial of all strings.

Each run assigns a teacher/student string to each prompt. All runs share one tree of rollouts: each distinct (prompt,
string) gives one image, and every metric takes each image once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from ddil_core.data.base import DataSet, Prompt
from ddil_core.diffusion.noise import Sample, decisions
from ddil_core.diffusion.rollout import STUDENT, TEACHER, require_stateless
from ddil_core.diffusion.schedule import Time
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.generate import TRUNCATED
from ddil_core.models.image_size import require_drawable
from ddil_core.support import ranks
from ddil_core.support.compute import ComputeKeys, LongDtypeName, NetworkDtypeKeys
from ddil_core.support.devices import DTYPES
from ddil_core.support.errors import WrongCommand
from ddil_core.support.files import write_text
from ddil_core.support.image_grids import image_grid
from ddil_core.support.lock import held_by_main
from ddil_core.support.progress import warn
from ddil_core.support.protocol import GuidanceScale, content_hash, renamed
from ddil_core.support.size import SizeKeys
from ddil_eval.experiments.drift_config import DriftConfig
from ddil_eval.experiments.image_sizes import ImageSizes, require_sizes
from ddil_eval.experiments.image_sources import slug
from ddil_eval.experiments.measurement import Cells
from ddil_eval.experiments.prompts import Prompts, choose_prompts, require_enough
from ddil_eval.experiments.reference_images import check_reference, describe_reference, open_reference
from ddil_eval.experiments.results import (
    RecordWriter,
    code_sha256,
    figures_folder,
    hashed,
    keep_protocol,
    recorded_metrics,
)
from ddil_eval.experiments.rollout_tree import Pair, RolloutTree, load_pair, roll_out_images
from ddil_eval.experiments.shared_drift import SharedDrift
from ddil_eval.experiments.shift_runs import (
    ShiftRun,
    effect_contrasts,
    mean_nfe,
    shift_runs,
    switched_string,
    tree_cost,
)
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.recipes import Recipe
from ddil_eval.features.storage import Features, delete_parts
from ddil_eval.report import figures
from ddil_eval.report.records import Record, RecordedModel
from ddil_eval.report.strips import write_strips
from ddil_eval.statistics import Estimate
from ddil_eval.statistics.two_sample import FOLDS

EXPERIMENT = "covariate-shift"
NOT_HASHED = frozenset({"teacher", "student", "sampling", "drift"})
"""Keys that the protocol's hash leaves out: records name the models with the hashes of their weights."""
Rate = Annotated[float, Field(allow_inf_nan=True)]  # the validator below refuses NaN with the same sentence as 1.5


class CovariateShiftConfig(NetworkDtypeKeys, SizeKeys):
    """The covariate-shift analysis as data. What is None comes from the recipe, and the recipe from the data set.

    Attributes:
        experiment: The name of the experiment.
        teacher: The teacher's reference.
        student: The student's reference; the analysis needs one.
        data: The reference of the data set.
        recipe: The name of the recipe.
        teacher_steps: The number of the teacher's steps on its own grid.
        guidance_scale: The teacher's guidance scale. Defaults to the model's own.
        solver: The solver of both models.
        p_teacher: The rates of Table 2, in [0, 1].
        switch: The switch times of Tables 3 and 4.
        factorial: Add all strings, with main effects and interactions.
        drift: Measure drift too, on the same rollouts.
        num_prompts: The number of prompts.
        reference_images: The number of images of the data set that generated ones are compared with.
        metrics: The names of the metrics.
        batch_size: The most rows in a batch of the device.
        chunk: The number of prompts between two points from which a stopped run goes on.
        figure_prompts: The number of prompts in Figure 2; 0 draws none.
        teacher_dtype: The dtype of the teacher's network. It defaults to ``dtype``, which is also the dtype of text
            encoder and autoencoder.
        student_dtype: The dtype of the student's network. It defaults to ``dtype``.
        seed: The seed of noise and decisions.
    """

    experiment: Literal["covariate-shift"] = "covariate-shift"
    teacher: str = "shapes"
    student: str | None = None
    data: str = "shapes"
    recipe: str | None = None
    teacher_steps: int = Field(default=32, ge=1)
    guidance_scale: GuidanceScale | None = None
    solver: str = "ddim"
    p_teacher: tuple[Rate, ...] = (0.8, 0.6, 0.4, 0.2)
    switch: tuple[Time, ...] = (749, 500, 250)
    factorial: bool = False
    drift: bool = False
    num_prompts: int | None = Field(default=None, ge=4)
    reference_images: int | None = renamed("reference_images", default=None, ge=2)
    metrics: tuple[str, ...] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=64, ge=1)
    chunk: int = Field(default=128, ge=1)
    figure_prompts: int = Field(default=4, ge=0)
    teacher_dtype: LongDtypeName = "float32"
    student_dtype: LongDtypeName = "float32"
    seed: int = Field(default=0, ge=0)

    @field_validator("p_teacher")
    @classmethod
    def _rates_are_probabilities(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        outside = [rate for rate in rates if not 0 <= rate <= 1]
        if outside:
            raise ValueError(
                f"p_teacher is a probability, from 0 (student alone) to 1 (teacher alone), not {outside[0]}"
            )
        return tuple(rate + 0.0 for rate in rates)  # -0.0 is 0

    @model_validator(mode="after")
    def _drift_fits(self) -> CovariateShiftConfig:
        if self.drift and self.solver != "ddim":
            raise ValueError(f"drift is measured with the solver 'ddim', and the solver is {self.solver!r}")
        own = {self.teacher_dtype, self.student_dtype}
        if self.drift and own != {DTYPES[self.dtype]}:
            raise ValueError(
                "drift is measured with both networks in the dtype of the models; leave teacher_dtype and "
                "student_dtype out, or measure without drift"
            )
        return self

    def figures_folder(self, out: Path) -> Path:
        """Return the folder of Figure 2, the curves and the cost, below the results folder ``out``."""
        return figures_folder(self, out, slug(Path(str(self.student)).name))

    def drift_config(self, num_prompts: int) -> DriftConfig:
        """Return the drift experiment that measures the same student on the same prompts.

        Raises:
            WrongCommand: there are too few prompts.
        """
        if num_prompts < FOLDS:
            raise WrongCommand(
                f"{num_prompts} prompts are too few to measure drift; measure at least {FOLDS}, or leave drift out"
            )
        shared = ("teacher", "data", "teacher_steps", "guidance_scale", "batch_size", "seed")
        given = {key: getattr(self, key) for key in (*shared, *ComputeKeys.model_fields, *SizeKeys.model_fields)}
        return DriftConfig(students=(str(self.student),), num_prompts=num_prompts, **given)


@dataclass(frozen=True)
class ShiftPlan:
    """An analysis that is ready to run.

    Attributes:
        config: The configuration.
        data: The data set.
        recipe: How images are prepared.
        num_reference_images: How many images of the data set generated ones are compared with.
        extractors: The networks of the metrics.
        pair: Teacher and student.
        prompts: The prompts.
        runs: The runs.
        drift: The drift on the same rollouts, or None.
    """

    config: CovariateShiftConfig
    data: DataSet
    recipe: Recipe
    num_reference_images: int
    extractors: Extractors
    pair: Pair
    prompts: Prompts
    runs: list[ShiftRun]
    drift: SharedDrift | None

    @property
    def protocol(self) -> dict[str, Any]:
        """The configuration with what it left to the recipe, and how each model is sampled."""
        return self.config.model_dump(mode="json") | {
            "recipe": self.recipe.model_dump(mode="json"),
            "metrics": list(self.extractors.metrics),
            "num_prompts": len(self.prompts.prompts),
            "reference_pictures": self.num_reference_images,
            "sampling": self.pair.sampling,
        }

    @property
    def described_data(self) -> dict[str, Any]:
        """What records say of the data set and of the prompts."""
        reference = describe_reference(self.data, self.num_reference_images, self.extractors.metrics)
        return reference | self.prompts.described()

    def work_key(self) -> str:
        """Hash all that finished chunks depend on, apart from their prompts and strings."""
        content = {
            "protocol": hashed(self.protocol, NOT_HASHED),
            "data": self.described_data,
            "networks": self.extractors.identity(),
            "weights": [model.weights_sha256() for model in (self.pair.teacher, self.pair.student)],
            "code": code_sha256(),
        } | ({"drift": True} if self.drift else {})  # such chunks hold more
        return content_hash(content)[:16]


def plan_covariate_shift(config: CovariateShiftConfig, device: str = "cpu") -> ShiftPlan:
    """Open all that an analysis needs: data first, then the metrics' networks, then the models.

    Raises:
        WrongCommand: no student, a solver that carries state, or models and settings that do not fit each other.
        DdilError: something is missing or damaged.
    """
    if config.student is None:
        raise WrongCommand("the analysis needs a student; name one with --student, or with --set student=REF")
    require_stateless(SOLVERS.find(config.solver))
    require_drawable((config.teacher, config.student), **config.size)
    recipe, data, images = open_reference(config.data, config.recipe, config.reference_images)
    extractors = Extractors(config.metrics or recipe.metrics, device, recipe)
    reference_sizes = check_reference(data, images, recipe, extractors.metrics)
    prompts = choose_prompts(data, config.num_prompts or recipe.images, None)
    captions = [prompt.text for prompt in prompts.prompts]
    require_enough(len(captions), config.data)
    if config.figure_prompts:
        data.prompts(config.figure_prompts)  # refuses more than there are, before hours of work
    drifting = config.drift_config(len(captions)) if config.drift else None
    pair = load_pair(
        config.teacher,
        config.student,
        device,
        teacher_steps=config.teacher_steps,
        guidance_scale=config.guidance_scale,
        solver=config.solver,
        compute=config.compute,
        size=config.size,
        teacher_dtype=config.teacher_dtype,
        student_dtype=config.student_dtype,
    )
    if config.figure_prompts:
        pair.teacher.require_pictures("leave Figure 2 out with --set figure_prompts=0")
    drawn = ImageSizes.drawn(config.teacher, pair.teacher.image_size)
    require_sizes(drawn, reference_sizes, recipe, extractors.metrics, captions)
    if cut := pair.teacher.cut(captions):
        warn(TRUNCATED.format(cut, len(captions)))
    draws = decisions([Sample(prompt.id) for prompt in prompts.prompts], len(pair.grid), config.seed)
    runs = shift_runs(config.p_teacher, config.switch, config.factorial, pair.grid, draws)
    drift = None if drifting is None else SharedDrift.of(drifting, pair, data, prompts)
    return ShiftPlan(config, data, recipe, images, extractors, pair, prompts, runs, drift)


def analyse_covariate_shift(config: CovariateShiftConfig, out: Path, device: str = "cpu") -> list[Record]:
    """Measure every run, save its record below ``out``, and draw Figure 2 and the curves of Tables 2 to 4.

    A stopped analysis goes on at the next chunk of prompts. Of several processes each rolls out its share of the
    chunks. The main process alone measures, saves and returns the records.

    Raises:
        DdilError: something is missing, does not fit, or another command uses the folder.
    """
    started = time.monotonic()
    plan = plan_covariate_shift(config, device)
    with held_by_main(out):
        work = out / "partial" / plan.work_key()
        tree = RolloutTree(
            plan.pair,
            plan.extractors,
            work,
            plan.prompts.prompts,
            plan.runs,
            config.seed,
            config.chunk,
            config.batch_size,
            None if plan.drift is None else plan.drift.watch(),
        )
        tree.grow()
        if not ranks.is_main():
            return []
        features, place, evaluations = tree.gather()
        rows = {run.key: np.array([place[i, string] for i, string in enumerate(run.strings)]) for run in plan.runs}
        estimates, effects = _estimates(plan, features, rows)
        records = _save(plan, estimates, effects, out, device, started)
        nfe = {run.key: mean_nfe(run, plan.pair.actors) for run in plan.runs}
        cost: dict[str, Any] = dict(tree_cost(evaluations, nfe, len(plan.prompts.prompts)))
        folder = config.figures_folder(out)
        keep_protocol(config, folder)
        figures.shift_curves(records, folder / "shift-curves.png")
        if plan.drift is not None:
            records += plan.drift.save(tree.gather_watched(), out, device, started)
            cost["drift"] = plan.drift.cost(plan.runs)
        write_text(folder / "evaluations.json", json.dumps(cost, indent=2) + "\n")
        if config.figure_prompts:
            images, prompts, columns = figure_2(plan)
            texts = [prompt.text for prompt in prompts]
            image_grid(images, texts, columns, folder / "figure2.png")
            write_strips(images, [prompt.id for prompt in prompts], texts, columns, folder, "figure2")
        delete_parts(work)
    return records


Estimates = dict[str, dict[str, Estimate]]
"""Estimates by cell and metric."""


def _estimates(plan: ShiftPlan, features: Features, rows: Mapping[str, np.ndarray]) -> tuple[Estimates, Iterable[str]]:
    """Estimate every run and, in a factorial, every effect; return the names of the effects too."""
    reference = plan.extractors.reference(plan.data, plan.num_reference_images)
    cells = Cells(features, rows, reference, plan.config.seed, plan.extractors.metrics)
    effects = effect_contrasts(plan.runs, len(plan.pair.grid)) if plan.config.factorial else {}
    return cells.estimates(cells.single() | effects), effects


def _save(
    plan: ShiftPlan, estimates: Estimates, effects: Iterable[str], out: Path, device: str, started: float
) -> list[Record]:
    """Save the records of all runs, then those of the effects."""
    config, pair, count = plan.config, plan.pair, len(plan.prompts.prompts)
    models = {"teacher": pair.teacher, "student": pair.student}
    writer = RecordWriter.of_run(
        out,
        experiment=EXPERIMENT,
        protocol=plan.protocol,
        not_hashed=NOT_HASHED,
        data=plan.described_data,
        recipe=plan.recipe.label(count, plan.num_reference_images),
        count=count,
        device=device,
        started=started,
    )
    fields = {
        "systems": {
            role: RecordedModel(reference=model.reference, weights_sha256=model.weights_sha256())
            for role, model in models.items()
        },
        "solver": config.solver,
        "grid": pair.grid,
        "guidance_scale": pair.sampling["teacher"]["guidance_scale"],
        "reflection": "none",
        "compute": config.compute,
        "size": pair.teacher.image_size if pair.teacher.asked_size else None,
        "seeds": [config.seed],
    }
    records = [
        writer.save(run.cell, recorded_metrics(estimates[run.key]), nfe=mean_nfe(run, pair.actors), **fields)
        for run in plan.runs
    ]
    for effect in effects:
        cell = {"kind": "effect", "transitions": json.loads(effect)}
        records.append(writer.save(cell, recorded_metrics(estimates[effect]), nfe=None, **fields))
    return records


def figure_2(plan: ShiftPlan) -> tuple[np.ndarray, Sequence[Prompt], Sequence[str]]:
    """Roll out Figure 2: the student alone, the teacher until each switch time, and the teacher alone.

    Returns:
        Images uint8 [prompts, columns, H, W, 3], the prompts, and the names of the columns.
    """
    config, grid = plan.config, plan.pair.grid
    prompts = plan.data.prompts(config.figure_prompts)
    columns = {"student alone": STUDENT * len(grid)}
    for switch in config.switch:
        columns[f"teacher until {switch}, then student"] = switched_string(TEACHER, STUDENT, switch, grid)
    columns["teacher alone"] = TEACHER * len(grid)
    images = roll_out_images(plan.pair, prompts, list(columns.values()), seed=config.seed, batch_size=config.batch_size)
    return images, prompts, list(columns)
