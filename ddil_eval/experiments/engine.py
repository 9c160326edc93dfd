"""The one engine of comparisons: every contestant's pictures, batch by batch through every metric, to records.

Where the pictures come from (a model and prompts, or a folder) is the contestant's; how they are prepared is the recipe's.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.dataset import DataSet
from ddil_core.distill.run import commit, versions
from ddil_core.progress import progress
from ddil_core.protocol import content_hash
from ddil_eval.experiments.records import save_cells
from ddil_eval.features import overlapped
from ddil_eval.generate import Batch, Made, Opened
from ddil_eval.measure import Cells, Extractors, Features, gathered, kept
from ddil_eval.metrics import METRICS
from ddil_eval.recipes import Recipe
from ddil_eval.statistics import Estimate
from ddil_eval.store import Record, System

EXPERIMENT = "compare"


@dataclass(frozen=True)
class Contestant:
    """A row: ``open`` loads what its pictures come from, ``cell`` is what its record's cell says beside its name."""

    name: str
    open: Callable[[], Opened]
    cell: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all rows share. ``protocol`` is the whole of it, ``shared`` that part of it that a row's numbers depend on."""

    protocol: dict[str, Any]
    shared: dict[str, Any]
    recipe: Recipe
    reference: DataSet
    reference_pictures: int
    data: dict[str, Any]
    count: int
    batch_size: int
    seed: int
    device: str

    @property
    def label(self) -> str:
        return self.recipe.label(self.count, self.reference_pictures)


def measure(
    contestants: Sequence[Contestant], differences: Sequence[tuple[str, str]], extractors: Extractors, setting: Setting,
    out: Path,
) -> list[Record]:  # fmt: skip
    """Measure every contestant and every difference, and save their records below ``out``.

    The reference comes first, to fail early. Interrupted, it goes on at the next batch.
    """
    started = time.monotonic()
    reference = extractors.reference(setting.reference, setting.reference_pictures)
    work = out / "partial" / _work_key(contestants, extractors, setting)
    made: dict[str, Made] = {}
    stream = (part for contestant in contestants for part in _features(contestant, extractors, setting, work, made))
    features = gathered(stream, setting.count * len(contestants), work / "features")
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
        "device": setting.device,
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
            "systems": {m: System(reference=made[m].reference, weights_sha256=made[m].weights_sha256) for m in members},
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


def _work_key(contestants: Sequence[Contestant], extractors: Extractors, setting: Setting) -> str:
    """All that finished batches depend on beside how a contestant's pictures are made; they are numbered by the batch."""
    depends = {
        "shared": setting.shared,
        "names": [contestant.name for contestant in contestants],
        "data": setting.data,
        "batch_size": setting.batch_size,
        "networks": extractors.identity(),
    }
    return content_hash(depends)[:16]


def _features(
    contestant: Contestant, extractors: Extractors, setting: Setting, work: Path, made: dict[str, Made]
) -> Iterator[Features]:
    """Features of a contestant's batches in their order; those done lie in ``work``. Extraction runs beside the drawing."""
    opened = contestant.open()
    made[contestant.name] = opened.made
    keeper, drawing = opened.keeper, opened.batches
    kept_in = None if keeper is None else str(keeper.folder)
    place = work / content_hash(asdict(opened.made) | {"name": contestant.name, "kept_in": kept_in})[:16]
    paths = [place / f"{index:06d}.npz" for index in range(len(drawing))]

    def drawn() -> Iterator[tuple[Path, Batch | None]]:
        for index, path in enumerate(paths):
            yield path, None if path.is_file() else drawing[index]

    def extracted(item: tuple[Path, Batch | None]) -> Features:
        path, batch = item
        if batch is not None and keeper is not None:
            keeper.keep(batch)
        return kept(path, lambda: extractors(batch.images, batch.captions) if batch is not None else {})

    with progress(contestant.name, total=setting.count) as advance:
        for features in overlapped(drawn(), extracted):
            yield features
            advance(len(next(iter(features.values()))))
    if keeper is not None:
        keeper.close()


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


def _steps(made: Made) -> dict[str, Any]:
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
