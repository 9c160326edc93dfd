"""The comparison of rows: the images of every row go batch by batch through all metrics, and become records.

A row knows where its images come from, a model with prompts or a folder. The recipe says how images are prepared.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ddil_core.support import ranks
from ddil_core.support.protocol import content_hash
from ddil_eval.experiments.measurement import Cells
from ddil_eval.experiments.results import RecordWriter, origin_fields, recorded_metrics
from ddil_eval.experiments.rows import Setting, System, collect, draw_row, join_features
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.storage import delete_parts
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record
from ddil_eval.statistics import Estimate

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
        systems: The rows.
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
    estimates, pairs = _estimates(cells, differences)
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
    origins = {row.name: row.origin for row in drawn}
    records = []
    for system in systems:
        origin = origins[system.name]
        steps = {"steps": len(origin.grid)} if origin.grid else {}
        cell = {"kind": "system", "name": system.name} | steps | system.cell
        metrics = recorded_metrics(estimates[system.name])
        records.append(writer.save(cell, metrics, **origin_fields([(system.name, origin)])))
    for name, (kind, pair) in pairs.items():
        cell = {"kind": kind, "name": name, "of": list(pair)}
        members = [(member, origins[member]) for member in pair]
        records.append(writer.save(cell, recorded_metrics(estimates[name]), **origin_fields(members)))
    del features, cells  # they read the files of the folder that goes
    delete_parts(work)
    return records


def differences_from_first(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs that compare each later name with the first."""
    return [(name, names[0]) for name in names[1:]]


Pairs = dict[str, tuple[str, tuple[str, str]]]
"""The name of a difference to its kind, "difference" or "pair", and its two systems, the first less the second."""


def _estimates(cells: Cells, differences: Sequence[tuple[str, str]]) -> tuple[dict[str, dict[str, Estimate]], Pairs]:
    """Estimate each system, each difference asked for, and the best less the next best in each metric."""
    single = cells.single()
    asked = {f"{a} − {b}": (a, b) for a, b in differences}
    others = {f"{a} − {b}": (a, b) for a, b in itertools.combinations(single, 2)}
    # One call for all pairs: it computes the spread of the cells once, and a difference costs little more.
    contrasts = {name: single[a] - single[b] for name, (a, b) in (others | asked).items()}
    estimates = cells.estimates(single | contrasts)
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
