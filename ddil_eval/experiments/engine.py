"""The comparison of rows: the images of every row go batch by batch through all metrics, and become records.

A row knows where its images come from, a model with prompts or a folder. The recipe says how images are prepared.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddil_core.support import ranks
from ddil_core.support.protocol import content_hash
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.experiments.measurement import Cells
from ddil_eval.experiments.results import RecordWriter, origin_fields, recorded_metrics
from ddil_eval.experiments.rows import Setting, System, collect, draw_row, join_features
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.storage import delete_parts
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record
from ddil_eval.statistics import Estimate
from ddil_eval.statistics.estimate import Families

EXPERIMENT = "systems"
"""The experiment in the records of this engine. Folders of images are systems too."""


def measure_systems(
    systems: Sequence[System],
    differences: Sequence[tuple[str, str]],
    extractors: Extractors,
    setting: Setting,
    out: Path,
) -> list[Record]:
    """Measure every system and every difference, and save their records below ``out``.

    The features of the reference come first, so that a missing file stops the run early. A stopped run goes on at the
    next batch, and uses the rows that an earlier run drew. Of several processes each draws its share. The main process
    alone measures, saves and returns the records.

    Args:
        systems: The systems. Those of one row are students of several training seeds, which are sampled in one way.
        differences: Pairs of names; the second is subtracted from the first.
        extractors: The networks of the metrics.
        setting: What all rows share.
        out: The results folder.
    """
    started = time.monotonic()
    reference = extractors.reference(setting.reference, setting.num_reference_images) if ranks.is_main() else {}
    drawn = [draw_row(system, extractors, setting, out) for system in systems]
    ranks.barrier()
    if not ranks.is_main():
        return []
    work = out / "partial" / content_hash([row.key for row in drawn])[:16]
    features = join_features([collect(row, setting.count) for row in drawn], setting.count, work)
    rows = {s.name: np.arange(setting.count) + place * setting.count for place, s in enumerate(systems)}
    cells = Cells(features, rows, reference, setting.seed, extractors.metrics)
    members = {name: list(same) for name, same in itertools.groupby(systems, key=lambda s: s.row or s.name)}
    estimates, pairs = _estimates(cells, members, differences)
    writer = RecordWriter.of_run(
        out,
        experiment=EXPERIMENT,
        protocol=setting.protocol,
        not_hashed=setting.not_hashed,
        data=setting.data,
        recipe=setting.label,
        count=setting.count,
        device=setting.device,
        started=started,
    )
    records = _save(members, {row.name: row.origin for row in drawn}, estimates, pairs, writer)
    del features, cells  # they read the files of the folder that goes
    delete_parts(work)
    return records


def _save(
    members: Mapping[str, Sequence[System]],
    origins: Mapping[str, ImageOrigin],
    estimates: Mapping[str, Mapping[str, Estimate]],
    pairs: Pairs,
    writer: RecordWriter,
) -> list[Record]:
    """Save the records of the rows and of the differences. ``members`` are the systems of each row."""
    made = {name: [(system.name, origins[system.name]) for system in same] for name, same in members.items()}
    records = []
    for name, same in members.items():
        origin = made[name][0][1]
        steps = {"steps": len(origin.grid)} if origin.grid else {}
        seeds = {"training_seeds": len(same)} if len(same) > 1 else {}
        cell = {"kind": "system", "name": name} | steps | seeds | same[0].cell
        fields = origin_fields(made[name]) | {"nfe": origin.nfe}  # the same of every seed
        records.append(writer.save(cell, recorded_metrics(estimates[name]), **fields))
    for name, (kind, pair) in pairs.items():
        cell = {"kind": kind, "name": name, "of": list(pair)}
        first, second = (made[member] for member in pair)
        records.append(writer.save(cell, recorded_metrics(estimates[name]), **origin_fields([*first, *second])))
    return records


def differences_from_first(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs that compare each later name with the first."""
    return [(name, names[0]) for name in names[1:]]


Pairs = dict[str, tuple[str, tuple[str, str]]]
"""The name of a difference to its kind, "difference" or "pair", and its two systems, the first less the second."""


@dataclass(frozen=True)
class _Mean:
    """The mean of the students of one row, or the difference of two means.

    Attributes:
        weights: The weights of the cells, [cells].
        by_seed: For each independent family of training seeds, the weights [seeds, cells] of each seed.
    """

    weights: np.ndarray
    by_seed: Families = ()

    def __sub__(self, other: _Mean) -> _Mean:
        """Return the difference of two means. Equally many training seeds are paired, in their order."""
        first, second = self.by_seed, other.by_seed
        paired = bool(first and second) and len(first[0]) == len(second[0])
        return _Mean(self.weights - other.weights, (first[0] - second[0],) if paired else (*first, *second))


def _estimates(
    cells: Cells, members: Mapping[str, Sequence[System]], differences: Sequence[tuple[str, str]]
) -> tuple[dict[str, dict[str, Estimate]], Pairs]:
    """Estimate each row, each difference asked for, and the best less the next best in each metric."""
    alone = cells.single()
    students = {name: np.stack([alone[system.name] for system in same]) for name, same in members.items()}
    single = {name: _Mean(one.mean(axis=0), (one,) if len(one) > 1 else ()) for name, one in students.items()}
    asked = {f"{a} − {b}": (a, b) for a, b in differences}
    others = {f"{a} − {b}": (a, b) for a, b in itertools.combinations(single, 2)}
    # One call for all pairs: it computes the spread of the cells once, and a difference costs little more.
    contrasts = {name: single[a] - single[b] for name, (a, b) in (others | asked).items()}
    every = single | contrasts
    weights, by_seed = ({name: getattr(mean, part) for name, mean in every.items()} for part in ("weights", "by_seed"))
    estimates = cells.estimates(weights, by_seed)
    pairs: Pairs = {name: ("difference", pair) for name, pair in asked.items()}
    leading = leaders({name: estimates[name] for name in single}) - {frozenset(pair) for pair in asked.values()}
    return estimates, pairs | {name: ("pair", pair) for name, pair in others.items() if frozenset(pair) in leading}


def leaders(estimates: Mapping[str, Mapping[str, Estimate]]) -> set[frozenset[str]]:
    """Return the names of the best and the next best system, for each metric."""
    pairs = set()
    for metric in next(iter(estimates.values())):
        sign = -1 if METRICS[metric].direction == "higher" else 1
        order = sorted(estimates, key=lambda name: sign * estimates[name][metric].value)
        pairs.add(frozenset(order[:2]))
    return pairs
