"""Prompt inversion (Table 5): did distillation keep the map from noise to data?

Reference pictures are inverted to prompts on the teacher; every system then draws from those prompts. How far a prompt's pictures
are from each other (LPIPS diversity) is what Table 5 reports; how near they are to the reference is measured beside it. Where the
true captions are known, so is how much of them each inverter found.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ddil_core.data.base import DataSet
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles, read_image, survey
from ddil_core.data.pool import image_side
from ddil_core.inversion import InversionProblem, SelectionSettings, get_inverter
from ddil_core.inversion.towers import SHAPES, load_inversion_towers, missing_towers
from ddil_core.inversion.words import Vocabulary, model_words, require_text_encoder
from ddil_core.models.autoencoder import require_encoder
from ddil_core.models.generate import resolve_sampling
from ddil_core.models.model import Model, load_model
from ddil_core.models.references import check_files, resolve
from ddil_core.models.weights import components, read_index
from ddil_core.support.errors import DdilError
from ddil_core.support.protocol import Strict, content_hash
from ddil_core.support.provenance import commit, versions
from ddil_eval.experiments.caption_recall import ATTRIBUTES, caption_recall
from ddil_eval.experiments.gallery import Drawn, Gallery, as_cell
from ddil_eval.experiments.image_sources import slug
from ddil_eval.experiments.inverted import invert_all, prompts_of
from ddil_eval.experiments.reference_images import split_of
from ddil_eval.experiments.results import recorded_metric
from ddil_eval.experiments.systems import SystemConfig, refuse_names
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.recipes import Preparation
from ddil_eval.metrics import METRICS
from ddil_eval.report import figures
from ddil_eval.report.records import Record, RecordedMetric, RecordedModel, digest, save_record
from ddil_eval.report.tables import paper_rows
from ddil_eval.statistics import estimate_mean

EXPERIMENT = "prompt-inversion"
LPIPS = ("lpips_diversity", "lpips_efflite0")
"""Table 5's, and the one for where AlexNet's weights are not."""


class InversionConfig(Strict):
    """The analysis as data.

    ``inverters`` are those to be run, with their settings, on the ``teacher``; the ``systems`` draw from the prompts of
    ``inverter``. ``towers`` is the folder of the CLIP that chooses prompts and compares pictures (None: the shapes world's own),
    ``vocabulary`` what prompts may hold (None: whole words, in the shapes world those of its captions), ``lpips`` the network
    (None: LPIPS' own where it is here). A prompt is chosen by ``choosing_pictures`` of each candidate, which the teacher draws
    in ``choosing_steps``.
    """

    experiment: Literal["prompt-inversion"] = "prompt-inversion"
    teacher: str = "shapes"
    data: str = "shapes"
    towers: str | None = None
    vocabulary: Vocabulary | None = None
    inverter: str = "ph2p"
    inverters: dict[str, dict[str, Any]] = Field(default={"ph2p": {}}, min_length=1)
    systems: tuple[SystemConfig, ...] = Field(min_length=1)
    differences: tuple[tuple[str, str], ...] = ()
    num_images: int = Field(default=32, ge=2)
    pictures_per_prompt: int = Field(default=10, ge=2)
    choosing_steps: int | None = Field(default=None, ge=1)
    choosing_pictures: int = Field(default=1, ge=1)
    lpips: Literal["lpips_diversity", "lpips_efflite0"] | None = None
    batch_size: int = Field(default=16, ge=1)
    draw_batch_size: int = Field(default=64, ge=1)
    figures: int = Field(default=32, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _names_fit(self) -> InversionConfig:
        refuse_names(self.systems, self.differences)
        if self.inverter not in self.inverters:
            raise ValueError(f"the inverter {self.inverter!r} is none of those to be run, {', '.join(self.inverters)}")
        paper = [(system.paper, system.steps) for system in self.systems if system.paper is not None]
        absent = [row for row in paper if row not in paper_rows("table5")]
        if absent:
            raise ValueError(f"the paper's Table 5 has no row {absent[0][0]!r} of {absent[0][1]} steps")
        return self

    @property
    def clip(self) -> str | None:
        """The towers' reference."""
        return SHAPES if self.towers is None and self.data == SHAPES else self.towers

    @property
    def distance(self) -> str:
        """The name of the metric between pictures."""
        return self.lpips or next((name for name in LPIPS if METRICS[name].missing() is None), LPIPS[-1])


@dataclass(frozen=True)
class Subjects:
    """The pictures to be inverted, uint8 [N, H, W, 3], with their ids, and their captions where these are of the shapes world."""

    ids: tuple[str, ...]
    images: np.ndarray
    captions: tuple[str, ...] | None


@dataclass(frozen=True)
class InversionPlan:
    """An analysis with all that it needs looked for; ``absent`` names what is not here, with what to provide."""

    config: InversionConfig
    data: DataSet | None
    systems: tuple[SystemConfig, ...]
    absent: dict[str, DdilError]
    possible: bool

    def require(self) -> DataSet:
        """The data, once enough is here to measure one system. Raises DdilError where it is not."""
        if self.data is None or not self.possible:
            raise DdilError("nothing can be measured: provide what is named above, and run the same command again")
        return self.data


def plan_inversion(config: InversionConfig) -> InversionPlan:
    """Look for what an analysis needs, row by row; nothing heavy is opened.

    Raises:
        WrongCommand: an inverter that is not known, or a setting that it does not have.
    """
    for name, chosen in config.inverters.items():
        get_inverter(name, chosen)
    absent: dict[str, DdilError] = {}
    data = None
    try:
        locate(config.teacher)
    except DdilError as error:
        absent[f"teacher {config.teacher}"] = error
    try:
        data = open_data(config.data)
        if isinstance(data, ImageFiles):
            survey(data.take(config.num_images, "pictures"), data.reference).warn_of_changes()
    except DdilError as error:
        absent[f"data {config.data}"] = error
    for name, problem in (("CLIP", missing_towers(config.clip)), (config.distance, METRICS[config.distance].missing())):
        if problem is not None:
            absent[name] = DdilError(problem)
    shared_is_here, systems = not absent, []
    for system in config.systems:
        try:
            locate(system.model)
            systems.append(system)
        except DdilError as error:
            hint = f"the model {system.model!r} is not here; {system.provide}"
            absent[system.name] = error if system.provide is None else type(error)(hint)
    return InversionPlan(config, data, tuple(systems), absent, shared_is_here and bool(systems))


def locate(reference: str) -> None:
    """Look for a model's files, and for a text encoder among its parts.

    Raises:
        DdilError: it is not here, or has none.
    """
    files = resolve(reference)
    check_files(files, reference)
    require_text_encoder(reference, components(read_index(files.folder)))


def subjects(data: DataSet, count: int, size: int) -> Subjects:
    """The first ``count`` pictures, cropped to their middle square and resized to ``size`` pixels.

    Raises:
        DdilError: one of them cannot be read; the message names it.
    """
    prepare = Preparation(crop=True, size=size, filter="lanczos")
    if isinstance(data, ImageFiles):
        files = data.take(count, "pictures")
        return Subjects(
            tuple(file.id for file in files), np.stack([prepare(read_image(file.path)) for file in files]), None
        )
    pictures = [
        image if image.shape[:2] == (size, size) else prepare(image) for batch in data.images(count) for image in batch
    ]
    prompts = data.prompts(count)
    captions = tuple(prompt.text for prompt in prompts) if data.reference == SHAPES else None
    return Subjects(tuple(prompt.id for prompt in prompts), np.stack(pictures), captions)


def vocabulary(config: InversionConfig) -> Vocabulary | tuple[str, ...]:
    """What prompts may hold."""
    if config.vocabulary is None and config.data == SHAPES:
        from ddil_core.shapes.training.architecture import caption_words

        return tuple(caption_words())
    return config.vocabulary or "words"


def measure_inversion(found: InversionPlan, out: Path, device: str = "cpu") -> list[Record]:
    """Invert, draw and measure, and save the records below ``out``, with a figure for each picture in ``out/inverted``.

    Interrupted, it goes on at the next picture.

    Raises:
        DdilError: nothing can be measured.
    """
    started, data, config = time.monotonic(), found.require(), found.config
    extractors, towers = Extractors([config.distance], device), load_inversion_towers(config.clip, device)
    teacher = load_model(config.teacher, device)
    require_encoder(teacher.pipeline.vae, teacher.reference)
    size = image_side(teacher)
    seen, allowed = subjects(data, config.num_images, size), vocabulary(config)
    words, tower_words = model_words(teacher, allowed), towers.words(allowed)
    problem = InversionProblem(teacher, words, seen.images, seen.ids, config.seed, towers, tower_words)
    choosing = SelectionSettings(resolve_sampling(teacher, config.choosing_steps), config.choosing_pictures)
    prompts = {
        name: prompts_of(invert_all(problem, name, chosen, config.batch_size, choosing, out / "inversions"))
        for name, chosen in config.inverters.items()
    }
    gallery = Gallery(
        seen.ids, seen.images, config.distance, extractors, towers, config.pictures_per_prompt, config.draw_batch_size,
        config.seed, out / "partial", device,
    )  # fmt: skip
    systems = [gallery.draw(system, prompts[config.inverter]) for system in found.systems]
    own = SystemConfig(name=config.teacher, model=config.teacher)
    inverters = {name: gallery.draw(own, texts, teacher) for name, texts in prompts.items()}
    common = shared(found, data, seen, gallery, teacher) | {"device": device, "wall_time_s": time.monotonic() - started}
    records = save_systems(systems, gallery, config, common, out)
    records += save_inverters(inverters, prompts, seen, gallery, config, common, out)
    for row in range(min(config.figures, len(seen.ids))):
        figures.inversion_figure(
            seen.images[row], [drawn.shown[row] for drawn in systems], prompts[config.inverter][row],
            [drawn.system.name for drawn in systems], out / "inverted" / f"{row:04d}-{slug(seen.ids[row])}.png",
        )  # fmt: skip
    shutil.rmtree(out / "partial", ignore_errors=True)
    return records


def shared(found: InversionPlan, data: DataSet, seen: Subjects, gallery: Gallery, teacher: Model) -> dict[str, Any]:
    """What all records have in common."""
    config = found.config
    inverters = {
        name: get_inverter(name, told)[1].model_dump(mode="json") for name, told in config.inverters.items()
    }  # with their defaults, so that records of other defaults are of another protocol
    protocol = config.model_dump(mode="json") | {"lpips": config.distance, "inverters": inverters}
    own = {"systems", "differences", "batch_size", "draw_batch_size", "figures"}  # no row's numbers depend on these
    size = seen.images.shape[1]
    return {
        "experiment": EXPERIMENT,
        "protocol": protocol,
        "protocol_hash": content_hash({key: value for key, value in protocol.items() if key not in own}),
        "data": {
            "reference": data.reference,
            "split": split_of(data),
            "prompt_ids_sha256": digest(list(seen.ids)),
            "pictures_sha256": hashlib.sha256(seen.images.tobytes()).hexdigest(),
            "teacher": teacher.reference,
            "teacher_weights_sha256": teacher.weights_sha256(),
            "inverter": config.inverter,
            "pictures_per_prompt": config.pictures_per_prompt,
            "size": size,
            "clip": gallery.towers.identity,
        },
        "recipe": f"{config.pictures_per_prompt} pictures a prompt, {size} px",
        "seeds": [config.seed],
        "n_asked": config.num_images,
        "n_done": len(seen.ids),
        "versions": versions(),
        "commit": commit(),
    }


Scores = Mapping[str, np.ndarray]
"""Metric to scores [N, cells]."""


def estimated(scores: Scores, contrast: np.ndarray, gallery: Gallery) -> dict[str, RecordedMetric]:
    """Σ contrast · mean of each metric, with its interval over the pictures' prompts; what was recovered is a rate."""
    found = {}
    for name, values in scores.items():
        rate = name.startswith("recovered")
        distance = name in (gallery.distance, gallery.to_reference)
        low, high = METRICS[gallery.distance].bounds if distance else (-1.0, 1.0)  # of what is no distance: a cosine
        estimate = estimate_mean(values, contrast, rate=rate, lowest=low, highest=high)
        if name == gallery.distance:
            found[name] = recorded_metric(name, estimate)
            continue
        network = None
        if name == gallery.to_reference:
            network = METRICS[gallery.distance].network.identity()
        elif name == gallery.towers.identity["name"]:
            network = gallery.towers.identity
        direction = gallery.directions.get(name, "higher")
        told = {"estimate": estimate, "direction": direction, "kind": "group", "network": network}
        found[name] = RecordedMetric.model_validate(told)
    return found


def save_inversion_cells(
    cells: Mapping[str, dict[str, Any]], pairs: Mapping[str, dict[str, Any]], drawn: Sequence[Drawn], scores: Scores,
    gallery: Gallery, common: dict[str, Any], out: Path,
) -> list[Record]:  # fmt: skip
    """A record for each of ``cells``, in the order of ``drawn``, and of ``pairs`` of them, the first less the second."""
    place = {name: index for index, name in enumerate(cells)}
    records = []
    for name, cell in (cells | pairs).items():  # type: ignore[operator]
        members = [place[one] for one in cell.get("of", [name])]
        contrast = np.zeros(len(cells))
        contrast[members] = [1.0, -1.0][: len(members)]
        made = drawn[members[0]].made
        own = {
            "cell": cell,
            "systems": {
                drawn[index].system.name: RecordedModel(
                    reference=drawn[index].made.reference, weights_sha256=drawn[index].made.weights_sha256
                )
                for index in members
            },
            "solver": made.solver,
            "grid": list(made.grid),
            "guidance_scale": made.guidance_scale,
            "reflection": made.reflection,
            "nfe": made.nfe if len(members) == 1 else None,
            "metrics": estimated(scores, contrast, gallery),
        }
        record = Record.model_validate(common | own)
        save_record(record, out)
        records.append(record)
    return records


def save_systems(
    drawn: Sequence[Drawn], gallery: Gallery, config: InversionConfig, common: dict[str, Any], out: Path
) -> list[Record]:
    """Table 5: the systems, the differences asked for, and the best pair of each metric."""
    scores = {name: np.stack([one.scores[name] for one in drawn], axis=1) for name in gallery.directions}
    cells = {one.system.name: as_cell(one) for one in drawn}
    asked = [pair for pair in config.differences if set(pair) <= set(cells)]
    pairs = {f"{a} − {b}": {"kind": "difference", "name": f"{a} − {b}", "of": [a, b]} for a, b in asked}
    for name, direction in gallery.directions.items():
        order = np.argsort(scores[name].mean(axis=0) * (-1 if direction == "higher" else 1))
        leading = [list(cells)[index] for index in order[:2]]
        if len(leading) == 2 and not any(set(pair["of"]) == set(leading) for pair in pairs.values()):
            label = " − ".join(leading)
            pairs[label] = {"kind": "pair", "name": label, "of": leading}
    return save_inversion_cells(cells, pairs, drawn, scores, gallery, common, out)


def save_inverters(
    drawn: Mapping[str, Drawn], prompts: Mapping[str, Sequence[str]], seen: Subjects, gallery: Gallery,
    config: InversionConfig, common: dict[str, Any], out: Path,
) -> list[Record]:  # fmt: skip
    """The inverters: what the teacher draws from their prompts and, where captions are known, how much of those they found."""
    scores = {name: np.stack([one.scores[name] for one in drawn.values()], axis=1) for name in gallery.directions}
    if seen.captions is not None:
        found = [
            [caption_recall(c, text) for c, text in zip(seen.captions, prompts[name], strict=True)] for name in drawn
        ]
        for attribute in ("all", *ATTRIBUTES):
            shares = [[shares[attribute] for shares in column] for column in found]
            scores["recovered" if attribute == "all" else f"recovered_{attribute}"] = np.array(shares).T
    cells = {name: {"kind": "inverter", "name": name} for name in drawn}
    others = [(config.inverter, name) for name in drawn if name != config.inverter]
    others += [(name, "random") for name in drawn if "random" in drawn and name not in (config.inverter, "random")]
    pairs = {f"{a} − {b}": {"kind": "inverter-difference", "name": f"{a} − {b}", "of": [a, b]} for a, b in others}
    return save_inversion_cells(cells, pairs, list(drawn.values()), scores, gallery, common, out)
