"""The one engine of comparisons: every contestant's pictures, batch by batch through every metric, to records.

Where the pictures come from (a model and prompts, or a folder) is the contestant's; how they are prepared is the recipe's.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.support import ranks
from ddil_core.support.protocol import content_hash
from ddil_core.support.provenance import commit, versions
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.experiments.measurement import Cells
from ddil_eval.experiments.results import save_cells
from ddil_eval.experiments.rows import Setting, System, collect, draw_row, join_features
from ddil_eval.features.extraction import RecipeExtractors
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record, RecordedModel
from ddil_eval.statistics import Estimate

EXPERIMENT = "systems"


def measure_systems(
    contestants: Sequence[System], differences: Sequence[tuple[str, str]], extractors: RecipeExtractors,
    setting: Setting, out: Path,
) -> list[Record]:  # fmt: skip
    """Measure every contestant and every difference, and save their records below ``out``.

    The reference comes first, to fail early. Interrupted, it goes on at the next batch; rows that were drawn before are taken
    up. Of several processes each draws its share, and the main one alone measures, saves and returns the records.
    """
    started = time.monotonic()
    reference = extractors.reference(setting.reference, setting.reference_pictures) if ranks.is_main() else {}
    drawn = [draw_row(contestant, extractors, setting, out) for contestant in contestants]
    ranks.barrier()
    if not ranks.is_main():
        return []
    made = {row.name: row.made for row in drawn}
    work = out / "partial" / content_hash([row.key for row in drawn])[:16]
    features = join_features([collect(row, setting.count) for row in drawn], setting.count, work)
    rows = {c.name: np.arange(setting.count) + place * setting.count for place, c in enumerate(contestants)}
    cells = Cells(features, rows, reference, setting.seed, extractors.metrics)
    estimates, pairs = _estimates(cells, differences)
    common = {
        "experiment": EXPERIMENT,
        "protocol": setting.protocol,
        "protocol_hash": content_hash(setting.shared),
        "data": setting.data,
        "recipe": setting.label,
        "n_asked": setting.count,
        "n_done": setting.count,
        "device": ranks.described(setting.device),
        "wall_time_s": time.monotonic() - started,
        "versions": versions(),
        "commit": commit(),
    }
    of = {c.name: (c.name,) for c in contestants} | {name: pair for name, (_, pair) in pairs.items()}
    described = {c.name: {"kind": "system", "name": c.name} | _steps(made[c.name]) | c.cell for c in contestants}
    described |= {name: {"kind": kind, "name": name, "of": list(pair)} for name, (kind, pair) in pairs.items()}
    records = []
    for name, members in of.items():
        first = made[members[0]]
        own = {
            "systems": {
                m: RecordedModel(reference=made[m].reference, weights_sha256=made[m].weights_sha256) for m in members
            },
            "solver": first.solver,
            "grid": list(first.grid),
            "guidance_scale": first.guidance_scale,
            "reflection": first.reflection,
            "pictures_sha256": first.pictures_sha256 if len(members) == 1 else None,
            "seeds": sorted({seed for m in members if (seed := made[m].seed) is not None}),
        }
        nfe = {name: first.nfe} if len(members) == 1 and first.nfe is not None else {}
        records += save_cells(common | own, {name: described[name]}, estimates, nfe, out)
    del features, cells
    shutil.rmtree(work, ignore_errors=True)
    return records


Pairs = dict[str, tuple[str, tuple[str, str]]]
"""A difference's name to its kind, "difference" or "pair", and the two systems, the first less the second."""


def _estimates(
    cells: Cells, differences: Sequence[tuple[str, str]]
) -> tuple[dict[str, dict[str, Estimate]], Pairs]:  # fmt: skip
    """Those of the contestants, of the differences asked for, and of the best and the next best in each metric."""
    single = cells.single()
    asked = {f"{a} − {b}": (a, b) for a, b in differences}
    others = {f"{a} − {b}": (a, b) for a, b in itertools.combinations(single, 2)}
    # All at once: a difference costs little beside the spread of its cells, which is found once in a call.
    found = cells.estimates(single | {name: single[a] - single[b] for name, (a, b) in (others | asked).items()})
    pairs: Pairs = {name: ("difference", pair) for name, pair in asked.items()}
    leading = leaders({name: found[name] for name in single}) - {frozenset(pair) for pair in asked.values()}
    return found, pairs | {name: ("pair", pair) for name, pair in others.items() if frozenset(pair) in leading}


def _steps(made: ImageOrigin) -> dict[str, Any]:
    """A cell's steps, where they are known."""
    return {"steps": len(made.grid)} if made.grid else {}


def leaders(found: Mapping[str, Mapping[str, Estimate]]) -> set[frozenset[str]]:
    """For each metric the names of the best and the next best."""
    pairs = set()
    for metric in next(iter(found.values())):
        sign = -1 if METRICS[metric].direction == "higher" else 1
        order = sorted(found, key=lambda name: sign * found[name][metric].value)
        pairs.add(frozenset(order[:2]))
    return pairs
