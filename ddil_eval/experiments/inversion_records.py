"""The records of prompt inversion: systems, inverters, and their differences."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.base import DataSet, in_words
from ddil_core.inversion import get_inverter
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support.size import SizeKeys
from ddil_eval.experiments.caption_recall import ATTRIBUTES, caption_recall
from ddil_eval.experiments.gallery import Drawn, Gallery
from ddil_eval.experiments.inversion_config import InversionConfig
from ddil_eval.experiments.reference_images import split_of
from ddil_eval.experiments.results import RecordWriter, origin_fields, recorded_metric
from ddil_eval.experiments.targets import TargetImages
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record, RecordedMetric, digest
from ddil_eval.statistics import estimate_mean

EXPERIMENT = "prompt-inversion"
NOT_HASHED = frozenset(
    {"systems", "differences", "batch_size", "draw_batch_size", "figures", "sampling", "dtype", "tf32", "compile"}
    | SizeKeys.model_fields.keys()
)
"""Keys of the configuration that no row's numbers depend on, or that the record of a row names itself."""
RECALL = "recovered"
"""The metric that says how much of the true captions an inverter recovers; a part of captions has a suffix."""

Scores = Mapping[str, np.ndarray]
"""Metric to scores [N, cells]."""


def inversion_writer(
    out: Path,
    config: InversionConfig,
    data: DataSet,
    targets: TargetImages,
    gallery: Gallery,
    teacher: Model,
    choosing: Sampling,
    started: float,
) -> RecordWriter:
    """Collect what all records of an inversion share.

    Args:
        out: The results folder.
        config: The inversion.
        data: The data set.
        targets: The inverted images.
        gallery: What measured the systems' images.
        teacher: The model that inverted them.
        choosing: How the teacher was sampled to choose among candidates.
        started: ``time.monotonic()`` at the start of the run.
    """
    inverters = {
        name: get_inverter(name, settings)[1].model_dump(mode="json") for name, settings in config.inverters.items()
    }  # with the defaults, so that other defaults give another protocol
    height, width = targets.images.shape[1:3]
    size = height if height == width else (height, width)
    protocol = config.model_dump(mode="json") | {"lpips": config.distance, "inverters": inverters}
    if config.guidance_scale is None:
        del protocol["guidance_scale"]  # a newer key, which must not change the hashes of older records
    return RecordWriter.of_run(
        out,
        experiment=EXPERIMENT,
        protocol=protocol | {"sampling": {"teacher": choosing.effective()}},
        not_hashed=NOT_HASHED,
        data={
            "reference": data.reference,
            "split": split_of(data),
            "prompt_ids_sha256": digest(list(targets.ids)),
            "pictures_sha256": hashlib.sha256(targets.images.tobytes()).hexdigest(),
            "teacher": teacher.reference,
            "teacher_weights_sha256": teacher.weights_sha256(),
            "inverter": config.inverter,
            "pictures_per_prompt": config.images_per_prompt,
            "size": size if height == width else [height, width],
            "clip": None if gallery.towers is None else gallery.towers.identity,
        },
        recipe=f"{config.images_per_prompt} pictures a prompt, {in_words(size)} px",  # in old records' identities
        count=len(targets.ids),
        device=gallery.device,
        started=started,
    )


def save_systems(
    drawn: Sequence[Drawn], config: InversionConfig, gallery: Gallery, writer: RecordWriter
) -> list[Record]:
    """Save Table 5: the systems, the differences asked for, and the best less the next best in each metric."""
    scores = {name: np.stack([row.scores[name] for row in drawn], axis=1) for name in gallery.directions}
    cells = {row.system.name: row.cell for row in drawn}
    asked = [pair for pair in config.differences if set(pair) <= set(cells)]
    pairs = {f"{a} − {b}": {"kind": "difference", "name": f"{a} − {b}", "of": [a, b]} for a, b in asked}
    for name, direction in gallery.directions.items():
        order = np.argsort(scores[name].mean(axis=0) * (-1 if direction == "higher" else 1))
        leading = [list(cells)[index] for index in order[:2]]
        if len(leading) == 2 and not any(set(pair["of"]) == set(leading) for pair in pairs.values()):
            label = " − ".join(leading)
            pairs[label] = {"kind": "pair", "name": label, "of": leading}
    return _save(cells, pairs, drawn, scores, gallery, writer)


def save_inverters(
    drawn: Mapping[str, Drawn],
    prompts: Mapping[str, Sequence[str]],
    targets: TargetImages,
    config: InversionConfig,
    gallery: Gallery,
    writer: RecordWriter,
) -> list[Record]:
    """Save the inverters: what the teacher draws from their prompts and, where captions are known, the caption recall.

    Args:
        drawn: The teacher's images, by inverter.
        prompts: The prompts, by inverter.
        targets: The inverted images.
        config: The inversion.
        gallery: What measured the teacher's images.
        writer: Saves the records.
    """
    scores = {name: np.stack([row.scores[name] for row in drawn.values()], axis=1) for name in gallery.directions}
    if targets.captions is not None:
        recalls = [
            [caption_recall(c, text) for c, text in zip(targets.captions, prompts[name], strict=True)] for name in drawn
        ]
        for attribute in ("all", *ATTRIBUTES):
            shares = [[recall[attribute] for recall in column] for column in recalls]
            scores[RECALL if attribute == "all" else f"{RECALL}_{attribute}"] = np.array(shares).T
    cells = {name: {"kind": "inverter", "name": name} for name in drawn}
    others = [(config.inverter, name) for name in drawn if name != config.inverter]
    others += [(name, "random") for name in drawn if "random" in drawn and name not in (config.inverter, "random")]
    pairs = {f"{a} − {b}": {"kind": "inverter-difference", "name": f"{a} − {b}", "of": [a, b]} for a, b in others}
    return _save(cells, pairs, list(drawn.values()), scores, gallery, writer)


def _save(
    cells: Mapping[str, dict[str, Any]],
    pairs: Mapping[str, dict[str, Any]],
    drawn: Sequence[Drawn],
    scores: Scores,
    gallery: Gallery,
    writer: RecordWriter,
) -> list[Record]:
    """Save a record for each cell, in the order of ``drawn``, and for each pair of cells, the first less the second."""
    place = {name: index for index, name in enumerate(cells)}
    records = []
    for name, cell in {**cells, **pairs}.items():
        members = [place[member] for member in cell.get("of", [name])]
        contrast = np.zeros(len(cells))
        contrast[members] = [1.0, -1.0][: len(members)]
        origins = origin_fields([(drawn[index].system.name, drawn[index].origin) for index in members])
        records.append(writer.save(cell, _metrics(scores, contrast, gallery), **origins))
    return records


def _metrics(scores: Scores, contrast: np.ndarray, gallery: Gallery) -> dict[str, RecordedMetric]:
    """Estimate Σ contrast · mean of each metric, with its interval over the prompts."""
    metrics = {}
    for name, values in scores.items():
        is_distance = name in (gallery.distance, gallery.to_reference)
        low, high = METRICS[gallery.distance].bounds if is_distance else (-1.0, 1.0)  # the others are cosines or shares
        estimate = estimate_mean(values, contrast, rate=name.startswith(RECALL), lowest=low, highest=high)
        if name == gallery.distance:
            metrics[name] = recorded_metric(name, estimate)
            continue
        network = None
        if name == gallery.to_reference:
            network = METRICS[gallery.distance].network.identity()
        elif gallery.towers is not None and name == gallery.likeness:
            network = gallery.towers.identity
        direction = gallery.directions.get(name, "higher")
        metrics[name] = RecordedMetric.model_validate(
            {"estimate": estimate, "direction": direction, "kind": "group", "network": network}
        )
    return metrics
