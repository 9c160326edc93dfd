"""Prompt inversion (Table 5): did distillation keep the map from noise to data?

An inverter finds a prompt for each image of the data set, on the teacher. Every system then draws from those prompts.
Table 5 reports how different the images of one prompt are (LPIPS diversity). The distance to the inverted image is
measured beside it and, where the true captions are known, how much of them each inverter recovers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddil_core.data.base import DataSet
from ddil_core.data.captioned import survey
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles
from ddil_core.data.pool import image_side
from ddil_core.inversion import InversionProblem, SelectionSettings
from ddil_core.inversion.towers import load_inversion_towers, missing_towers
from ddil_core.inversion.words import model_words, require_text_encoder
from ddil_core.models.autoencoder import require_encoder
from ddil_core.models.generate import resolve_sampling
from ddil_core.models.image_size import require_drawable
from ddil_core.models.model import load_model
from ddil_core.models.references import check_files, resolve
from ddil_core.models.sampling import sampling_line
from ddil_core.models.weights import components, read_index
from ddil_core.support import ranks
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.lock import held
from ddil_core.support.progress import note
from ddil_eval.experiments.gallery import Drawn, Gallery
from ddil_eval.experiments.image_sources import slug
from ddil_eval.experiments.inversion_config import InversionConfig
from ddil_eval.experiments.inversion_records import inversion_writer, save_inverters, save_systems
from ddil_eval.experiments.inverted import invert_all
from ddil_eval.experiments.results import keep_protocol
from ddil_eval.experiments.system_configs import (
    NOTHING_TO_MEASURE,
    SystemConfig,
    find_systems,
    report_absent,
)
from ddil_eval.experiments.targets import TargetImages, read_targets, vocabulary
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.storage import delete_parts
from ddil_eval.metrics import METRICS
from ddil_eval.report import figures
from ddil_eval.report.records import Record
from ddil_eval.report.strips import write_strips


@dataclass(frozen=True)
class InversionPlan:
    """A prompt inversion, and which of its parts are on this machine.

    Attributes:
        config: The configuration, with the inverters that can run here.
        data: The data set, if it is here.
        systems: The systems that are here.
        absent: What is not here, by name, each with an error that says what to provide.
        possible: Whether teacher, data, networks and at least one system are here.
    """

    config: InversionConfig
    data: DataSet | None
    systems: tuple[SystemConfig, ...]
    absent: dict[str, DdilError]
    possible: bool


def plan_inversion(config: InversionConfig) -> InversionPlan:
    """Look for all that an inversion needs. No network is loaded.

    Raises:
        WrongCommand: an inverter is unknown, or does not have a setting.
    """
    absent: dict[str, DdilError] = {}
    data = None
    try:
        locate(config.teacher)
    except DdilError as error:
        absent[f"teacher {config.teacher}"] = error
    try:
        data = open_data(config.data)
        if isinstance(data, ImageFiles):
            survey(data.take(config.num_images, "images"), data.reference).warn_of_changes()
    except DdilError as error:
        absent[f"data {config.data}"] = error
    for name, problem in (("CLIP", _missing_clip(config)), (config.distance, METRICS[config.distance].missing())):
        if problem is not None:
            absent[name] = DdilError(problem)
    systems, absent_systems = find_systems(config.systems, locate)
    lacking = {} if config.clip is not None else {name: missing_towers(None) for name in config.inverters_with_towers}
    possible = not absent and bool(systems) and config.inverter not in lacking
    absent |= {f"inverter {name}": DdilError(problem or "") for name, problem in lacking.items()}
    here = {name: settings for name, settings in config.inverters.items() if name not in lacking}
    config = config.model_copy(update={"inverters": here})
    return InversionPlan(config, data, systems, absent | absent_systems, possible)


def _missing_clip(config: InversionConfig) -> str | None:
    """Return what the CLIP that the configuration names lacks, in one sentence, or None."""
    return None if config.clip is None else missing_towers(config.clip)


def locate(reference: str) -> None:
    """Look for the files of a model that has a text encoder.

    Raises:
        DdilError: the files are not here, or the model has no text encoder.
    """
    files = resolve(reference)
    check_files(files, reference)
    require_text_encoder(reference, components(read_index(files.folder)))


def run_prompt_inversion(config: InversionConfig, out: Path, device: str = "cpu") -> list[Record]:
    """Invert, draw and measure; report what is not here, and measure the rest.

    Args:
        config: The inversion.
        out: The results folder; no other command may use it meanwhile.
        device: The device of this process.

    Raises:
        WrongCommand: several processes were started.
        DdilError: nothing can be measured.
    """
    ranks.require_one("prompt inversion")
    plan = plan_inversion(config)
    report_absent(plan.absent)
    with held(out):
        return measure_inversion(plan, out, device)


def measure_inversion(plan: InversionPlan, out: Path, device: str = "cpu") -> list[Record]:
    """Measure what is here; save the records and a figure of each inverted image below ``out``.

    A stopped inversion goes on at the next image.

    Raises:
        DdilError: nothing can be measured.
    """
    started, config = time.monotonic(), plan.config
    if plan.data is None or not plan.possible:
        raise DdilError(NOTHING_TO_MEASURE)
    for system in (SystemConfig(name=config.teacher, model=config.teacher), *plan.systems):
        require_drawable([system.model], **system.size(config.size))
    extractors = Extractors([config.distance], device)
    towers = None if config.clip is None else load_inversion_towers(config.clip, device)
    teacher = load_model(config.teacher, device, **config.size)
    require_encoder(teacher.pipeline.vae, teacher.reference)
    targets, allowed = read_targets(plan.data, config.num_images, image_side(teacher)), vocabulary(config)
    words, tower_words = model_words(teacher, allowed), None if towers is None else towers.words(allowed)
    problem = InversionProblem(teacher, words, targets.images, targets.ids, config.seed, towers, tower_words)
    own = resolve_sampling(teacher, config.choosing_steps, guidance_scale=config.guidance_scale)
    choosing = SelectionSettings(own, config.choosing_images)
    note(sampling_line(f"{config.teacher}, to choose prompts", own.effective()))
    prompts = _invert(problem, config, choosing, out / "inversions")
    config = config.model_copy(update={"inverters": {name: config.inverters[name] for name in prompts}})
    gallery = Gallery(
        ids=targets.ids,
        references=targets.images,
        distance=config.distance,
        extractors=extractors,
        towers=towers,
        number=config.images_per_prompt,
        batch_size=config.draw_batch_size,
        seed=config.seed,
        work=out / "partial" / "inversion",
        device=device,
        compute=config.compute,
        size=config.size,
    )
    systems = [gallery.draw(config.guided(system), prompts[config.inverter]) for system in plan.systems]
    teacher_row = config.guided(SystemConfig(name=config.teacher, model=config.teacher))
    drawing = teacher if config.compute == teacher.compute else None
    inverters = {name: gallery.draw(teacher_row, texts, drawing) for name, texts in prompts.items()}
    writer = inversion_writer(out, config, plan.data, targets, gallery, teacher, own, started)
    records = save_systems(systems, config, gallery, writer)
    records += save_inverters(inverters, prompts, targets, config, gallery, writer)
    folder = plan.config.figures_folder(out)
    keep_protocol(plan.config, folder)
    for row, name in enumerate(targets.ids[: config.figures]):
        figures.inversion_figure(
            targets.images[row],
            [drawn.shown[row] for drawn in systems],
            prompts[config.inverter][row],
            [drawn.system.name for drawn in systems],
            folder / "inverted" / f"{row:04d}-{slug(name)}.png",
        )
    _keep_strips(systems, targets, prompts[config.inverter], config.figures, folder)
    for place in gallery.places:
        delete_parts(place)
    return records


def _invert(
    problem: InversionProblem, config: InversionConfig, choosing: SelectionSettings, folder: Path
) -> dict[str, list[str]]:
    """Return the prompts of each inverter. A line names those that do not fit the teacher, unless they are needed.

    Raises:
        WrongCommand: the inverter whose prompts the systems draw does not fit the teacher.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(config.inverters, key=lambda name: name != config.inverter):  # the needed one first
        try:
            found[name] = invert_all(problem, name, config.inverters[name], config.batch_size, choosing, folder)
        except WrongCommand as error:
            if name == config.inverter:
                raise WrongCommand(f"the inverter {name!r} does not fit: {error}") from error
            report_absent({f"inverter {name}": error})
    return {name: found[name] for name in config.inverters if name in found}


def _keep_strips(
    systems: Sequence[Drawn], targets: TargetImages, prompts: Sequence[str], count: int, folder: Path
) -> None:
    """Keep the reference and the first image of each system for the first ``count`` prompts, with their scores."""
    if not targets.ids[:count]:
        return
    images = np.stack([targets.images[:count], *(drawn.shown[:count] for drawn in systems)], axis=1)
    scores = {
        metric: np.stack([np.full(len(images), np.nan), *(drawn.scores[metric][:count] for drawn in systems)], axis=1)
        for metric in systems[0].scores
    }
    columns = ["reference", *(drawn.system.name for drawn in systems)]
    write_strips(images, targets.ids[:count], prompts[:count], columns, folder, "inverted", scores)
