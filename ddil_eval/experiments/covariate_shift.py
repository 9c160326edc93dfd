"""The covariate-shift analysis: Tables 2, 3, 4, their two pure runs, Figure 2, and the factorial of all strings.

Every run is a choice of one teacher/student string for each prompt, so all runs share one prefix tree of rollouts, one
picture for each distinct (prompt, string), and one pass of every metric over those.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from ddil_core.data.base import Prompt
from ddil_core.data.datasets import open_data
from ddil_core.diffusion.noise import Sample, decisions, initial_noise
from ddil_core.diffusion.rollout import (
    NAMES,
    STUDENT,
    TEACHER,
    Actor,
    all_strings,
    require_stateless,
    rollout_latents,
    strings_at,
)
from ddil_core.diffusion.schedule import Time
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.generate import TRUNCATED
from ddil_core.models.model import Model, load_model
from ddil_core.models.turns import take_turns
from ddil_core.support import ranks
from ddil_core.support.environment import full_precision
from ddil_core.support.errors import WrongCommand
from ddil_core.support.files import write_text
from ddil_core.support.progress import progress, warn
from ddil_core.support.protocol import GuidanceScale, Strict, content_hash
from ddil_eval.experiments.measurement import Cells, batches
from ddil_eval.experiments.prompts import choose_prompts
from ddil_eval.experiments.reference_images import describe_reference, open_reference
from ddil_eval.experiments.results import provenance, save_cells
from ddil_eval.features.extraction import Extractors, RecipeExtractors
from ddil_eval.features.recipes import Recipe
from ddil_eval.features.storage import Arrays, Features, cached_arrays, concatenate
from ddil_eval.report.cells import MOST_TRANSITIONS
from ddil_eval.report.records import Record, digest

EXPERIMENT = "covariate-shift"
Rate = Annotated[float, Field(allow_inf_nan=True)]  # what is no probability is refused below, in one sentence for all
Dtype = Literal["float32", "bfloat16"]


class CovariateShiftConfig(Strict):
    """The analysis as data. ``p_teacher`` and ``switch`` are Table 2's rates and Tables 3 and 4's switch times.

    ``recipe`` is the data set's where none is named; ``metrics``, ``num_prompts`` and ``reference_pictures`` are the recipe's
    where they are not given. ``teacher_dtype`` and ``student_dtype`` are those of the two networks' weights; text encoder and
    autoencoder are float32.
    """

    experiment: Literal["covariate-shift"] = "covariate-shift"
    data: str = "shapes"
    recipe: str | None = None
    teacher_steps: int = Field(default=32, ge=1)
    guidance_scale: GuidanceScale | None = None
    solver: str = "ddim"
    p_teacher: tuple[Rate, ...] = (0.8, 0.6, 0.4, 0.2)
    switch: tuple[Time, ...] = (749, 500, 250)
    factorial: bool = False
    num_prompts: int | None = Field(default=None, ge=4)
    reference_pictures: int | None = Field(default=None, ge=2)
    metrics: tuple[str, ...] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=64, ge=1)
    chunk: int = Field(default=128, ge=1)
    figure_prompts: int = Field(default=4, ge=0)
    teacher_dtype: Dtype = "float32"
    student_dtype: Dtype = "float32"
    seed: int = Field(default=0, ge=0)

    @field_validator("p_teacher")
    @classmethod
    def _rates_are_probabilities(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        outside = [rate for rate in rates if not 0 <= rate <= 1]
        if outside:
            raise ValueError(
                f"p_teacher is a probability, from 0 (student alone) to 1 (teacher alone), not {outside[0]}"
            )
        return rates


@dataclass(frozen=True)
class ShiftRun:
    """One cell of the analysis: what it is called in records, and the string that each prompt follows."""

    cell: dict[str, Any]
    strings: list[str]

    @property
    def key(self) -> str:
        return content_hash(self.cell)


def runs(config: CovariateShiftConfig, student_grid: list[Time], samples: Sequence[Sample]) -> list[ShiftRun]:
    """The runs that a configuration asks for.

    Raises:
        WrongCommand: a switch time that is no inner point of the student's grid, or a factorial of too many strings.
    """
    length, count = len(student_grid), len(samples)
    if config.factorial and length > MOST_TRANSITIONS:
        raise WrongCommand(
            f"the factorial of a student of {length} steps has 2^{length} strings, and at most 2^{MOST_TRANSITIONS} are drawn; "
            "leave --factorial out, or take a student of fewer steps"
        )
    pure = [
        ShiftRun({"kind": "pure", "model": "teacher"}, [TEACHER * length] * count),
        ShiftRun({"kind": "pure", "model": "student"}, [STUDENT * length] * count),
    ]
    draws = decisions(samples, length, config.seed)
    mixed = [ShiftRun({"kind": "p_teacher", "p_teacher": p}, strings_at(p, draws)) for p in config.p_teacher]
    switched = []
    for kind, first, second in (("teacher_then_student", TEACHER, STUDENT), ("student_then_teacher", STUDENT, TEACHER)):
        for switch in config.switch:
            if switch not in student_grid[1:]:
                raise WrongCommand(
                    f"the switch time {switch} is not on the student's grid, where one model can hand over to the other: "
                    f"it may be {', '.join(map(str, student_grid[1:]))}"
                )
            before = student_grid.index(switch)
            switched.append(
                ShiftRun({"kind": kind, "switch_t": switch}, [first * before + second * (length - before)] * count)
            )
    factorial = (
        [ShiftRun({"kind": "string", "string": s}, [s] * count) for s in all_strings(length)]
        if config.factorial
        else []
    )
    wanted = pure + mixed + switched + factorial
    return list({run.key: run for run in wanted}.values())  # a rate that was given twice is one cell


def load_pair(teacher: str, student: str, config: CovariateShiftConfig, device: str) -> tuple[Model, Model]:
    """The two models, their networks in the dtypes that the configuration names."""
    models = load_model(teacher, device), load_model(student, device)
    for model, dtype in zip(models, (config.teacher_dtype, config.student_dtype), strict=True):
        model.denoiser.net.to(getattr(torch, dtype))
    return models


def names(teacher: str, student: str) -> dict[str, str]:
    """What messages call the two actors."""
    return {TEACHER: f"the teacher {teacher!r}", STUDENT: f"the student {student!r}"}


def analyse_covariate_shift(
    teacher: str, student: str, config: CovariateShiftConfig, out: Path, device: str = "cpu"
) -> list[Record]:
    """Measure every run and save its record below ``out``; returns the records.

    Interrupted, it goes on at the next chunk of prompts. Of several processes each grows its share of the chunks, and the main
    one alone measures, saves and returns the records.
    """
    started = time.monotonic()
    require_stateless(solver := SOLVERS.find(config.solver))
    recipe, data, pictures = open_reference(config.data, config.recipe, config.reference_pictures)
    extractors = RecipeExtractors(config.metrics or recipe.metrics, device, recipe)
    teacher_model, student_model = load_pair(teacher, student, config, device)
    settings = config.teacher_steps, config.guidance_scale, config.solver
    actors, student_grid = take_turns(teacher_model, student_model, *settings)
    chosen = choose_prompts(data, config.num_prompts or recipe.images, None)
    prompts = chosen.prompts
    if cut := teacher_model.cut([prompt.text for prompt in prompts]):
        warn(TRUNCATED.format(cut, len(prompts)))
    samples = [Sample(prompt.id) for prompt in prompts]
    wanted = runs(config, student_grid, samples)
    protocol = resolved(config, recipe, extractors.metrics, len(prompts), pictures)
    described = describe_reference(data, pictures, extractors.metrics) | chosen.described()
    work = out / "partial" / _work_key(protocol, described, extractors, (teacher_model, student_model))
    told = names(teacher, student)
    tree = Tree(teacher_model, actors, config, extractors, work, prompts, samples, wanted, told)
    tree.grow()
    if not ranks.is_main():
        return []
    features, place, evaluations = tree.gather()
    rows = {run.key: np.array([place[index, string] for index, string in enumerate(run.strings)]) for run in wanted}
    reference = extractors.reference(data, pictures)
    cells = Cells(features, rows, reference, config.seed, extractors.metrics)
    effects = effect_contrasts(wanted, len(student_grid)) if config.factorial else {}
    estimates = cells.estimates(cells.single() | effects)
    scale = teacher_model.sampling.guidance_scale if config.guidance_scale is None else config.guidance_scale
    common = provenance(
        experiment=EXPERIMENT,
        protocol=protocol,
        systems={"teacher": teacher_model, "student": student_model},
        data=described,
        recipe=recipe.label(len(prompts), pictures),
        solver=solver.name,
        grid=student_grid,
        guidance_scale=scale,
        reflection="none",
        seeds=[config.seed],
        n_asked=len(prompts),
        n_done=len(prompts),
        device=ranks.described(device),
        wall_time_s=time.monotonic() - started,
    )
    nfe = {run.key: mean_nfe(run, actors) for run in wanted}
    named = {run.key: run.cell for run in wanted} | {
        key: {"kind": "effect", "transitions": json.loads(key)} for key in effects
    }
    records = save_cells(common, named, estimates, nfe, out)
    write_text(out / "evaluations.json", json.dumps(cost(evaluations, nfe, len(samples)), indent=2) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    return records


def resolved(
    config: CovariateShiftConfig, recipe: Recipe, metrics: Sequence[str], count: int, pictures: int
) -> dict[str, Any]:
    """A configuration for a record, with what it left to the recipe."""
    chosen = {
        "recipe": recipe.model_dump(mode="json"),
        "metrics": list(metrics),
        "num_prompts": count,
        "reference_pictures": pictures,
    }
    return config.model_dump(mode="json") | chosen


def _work_key(
    protocol: Mapping[str, Any], data: Mapping[str, Any], extractors: Extractors, models: Sequence[Model]
) -> str:
    """All that finished chunks depend on; they are numbered by their prompts and strings."""
    depends = {
        "protocol": protocol,
        "data": data,
        "networks": extractors.identity(),
        "weights": [model.weights_sha256() for model in models],
    }
    return content_hash(depends)[:16]


def mean_nfe(run: ShiftRun, actors: Mapping[str, Actor]) -> float:
    """Network evaluations of a run by itself, a mean over its prompts."""
    return float(np.mean([sum(actors[a].nfe[k] for k, a in enumerate(string)) for string in run.strings]))


def cost(evaluations: Mapping[str, int], nfe: Mapping[str, float], count: int) -> dict[str, float]:
    """Network evaluations a prompt: all runs in one tree, each run on its own, and the share that the tree needs."""
    shared, alone = sum(evaluations.values()) / count, sum(nfe.values())
    return {"shared": shared, "alone": alone, "share": shared / alone}


def effect_contrasts(wanted: Sequence[ShiftRun], length: int) -> dict[str, np.ndarray]:
    """Weights over the runs for every main effect and pairwise interaction of a 2^K factorial.

    With x = 1 where the student acts and -1 where the teacher does, the effect of a set of transitions is the mean of the
    strings whose product of x is 1, less the mean of the others. Keys are the transitions as JSON.
    """
    strings = [run.cell.get("string") for run in wanted]
    contrasts = {}
    for order in (1, 2):
        for transitions in combinations(range(length), order):
            signs = [0 if s is None else np.prod([1 if s[k] == STUDENT else -1 for k in transitions]) for s in strings]
            contrasts[json.dumps(transitions)] = np.array(signs) / 2 ** (length - 1)
    return contrasts


@dataclass
class Tree:
    """Grows the rollouts chunk by chunk: latents → pictures → features. A chunk that is done is on disk and is not done again."""

    decoder: Model
    actors: dict[str, Actor]
    config: CovariateShiftConfig
    extractors: Extractors
    work: Path
    prompts: Sequence[Prompt]
    samples: Sequence[Sample]
    wanted: Sequence[ShiftRun]
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)

    def grow(self) -> None:
        """Make this process's share of the chunks, and wait until all are made."""
        chunks = list(batches(len(self.samples), self.config.chunk))
        own = [chunks[index] for index in ranks.mine(len(chunks))]
        with progress("rollouts", total=sum(chunk.stop - chunk.start for chunk in own)) as advance:
            for chunk in own:
                self._chunk(chunk)
                advance(chunk.stop - chunk.start)
        ranks.barrier()

    def gather(self) -> tuple[Features, dict[tuple[int, str], int], dict[str, int]]:
        """Features of every distinct picture, the row of each (prompt, string), and the network evaluations by actor."""
        parts: list[Features] = []
        place: dict[tuple[int, str], int] = {}
        evaluations = dict.fromkeys(self.actors, 0)
        for chunk in batches(len(self.samples), self.config.chunk):
            arrays = self._chunk(chunk)
            keys = zip(arrays["sample"].tolist(), arrays["string"].tolist(), strict=True)
            place.update({key: len(place) + row for row, key in enumerate(keys)})
            parts.append({name: arrays[name] for name in self.extractors.open})
            evaluations = {name: count + int(arrays[f"evaluations {name}"]) for name, count in evaluations.items()}
        return concatenate(parts), place, evaluations

    def _chunk(self, chunk: slice) -> Arrays:
        """What ``_measure`` gives of a chunk, from its file where it is done."""
        strings = [sorted({run.strings[index] for run in self.wanted}) for index in range(chunk.start, chunk.stop)]
        path = self.work / f"{digest([strings, chunk.start])[:16]}.npz"
        return cached_arrays(path, lambda: self._measure(chunk, strings))

    @full_precision()
    def _measure(self, chunk: slice, strings: list[list[str]]) -> Arrays:
        """One chunk: its metrics' features, the (sample, string) of each row, and the evaluations of each actor."""
        model, size = self.decoder, self.config.batch_size
        condition = model.encode([prompt.text for prompt in self.prompts[chunk]])
        z = initial_noise(self.samples[chunk], model.latent_shape, self.config.seed).to(model.device)
        leaves = rollout_latents(self.actors, z, condition, strings, batch_size=size, names=self.names)
        texts = [self.prompts[chunk.start + row].text for row in leaves.sample]
        features = concatenate(
            [self.extractors(model.decode(leaves.latents[part]), texts[part]) for part in batches(len(texts), size)]
        )
        places = {"sample": chunk.start + np.array(leaves.sample), "string": np.array(leaves.string)}
        return features | places | {f"evaluations {name}": np.array(n) for name, n in leaves.evaluations.items()}


@full_precision()
def figure_pictures(
    teacher: str, student: str, config: CovariateShiftConfig, device: str = "cpu"
) -> tuple[np.ndarray, list[str], list[str]]:
    """Figure 2: for some prompts the pictures of the student alone, the teacher until each switch time, the teacher alone.

    Returns pictures uint8 [prompts, columns, H, W, 3], the prompts, the columns' names.
    """
    teacher_model, student_model = load_pair(teacher, student, config, device)
    settings = config.teacher_steps, config.guidance_scale, config.solver
    actors, student_grid = take_turns(teacher_model, student_model, *settings)
    prompts = open_data(config.data).prompts(config.figure_prompts)
    length = len(student_grid)
    columns = {"student alone": STUDENT * length}
    for switch in config.switch:
        before = student_grid.index(switch)
        columns[f"teacher until {switch}, then student"] = TEACHER * before + STUDENT * (length - before)
    columns["teacher alone"] = TEACHER * length
    z = initial_noise([Sample(p.id) for p in prompts], teacher_model.latent_shape, config.seed).to(teacher_model.device)
    condition = teacher_model.encode([p.text for p in prompts])
    leaves = rollout_latents(
        actors, z, condition, [set(columns.values())] * len(prompts), batch_size=config.batch_size,
        names=names(teacher, student),
    )  # fmt: skip
    images = teacher_model.decode(leaves.latents)
    place = {key: row for row, key in enumerate(zip(leaves.sample, leaves.string, strict=True))}
    picture_grid = np.stack([[images[place[i, s]] for s in columns.values()] for i in range(len(prompts))])
    return picture_grid, [p.text for p in prompts], list(columns)
