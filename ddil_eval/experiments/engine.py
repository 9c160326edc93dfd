"""The one engine of comparisons: contestants' pictures, batch by batch through every metric, to records of them and their differences.

Where the pictures come from (a model and prompts, or a folder) is the contestant's; how they are prepared is the recipe's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data import DataSet
from ddil_core.distill.run import commit, versions
from ddil_core.progress import progress
from ddil_core.protocol import content_hash
from ddil_eval.experiments.records import save_cells
from ddil_eval.features import overlapped
from ddil_eval.generate import Batch, Batches, Keeper, Made
from ddil_eval.measure import Cells, Extractors, Features, gathered, kept
from ddil_eval.metrics import METRICS
from ddil_eval.recipes import Recipe
from ddil_eval.statistics import Estimate
from ddil_eval.store import Record, System

EXPERIMENT = "compare"


@dataclass(frozen=True)
class Contestant:
    """A row: ``open`` loads what its pictures come from, ``cell`` is what its record's cell says beside its name.

    ``keep`` is the folder that its pictures are kept in.
    """

    name: str
    open: Callable[[], tuple[Made, Batches]]
    cell: dict[str, Any] = field(default_factory=dict)
    keep: Path | None = None


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
    reference = extractors.reference(setting.reference, setting.reference_pictures, content_hash(setting.recipe.model_dump()))
    work = out / "partial" / content_hash({"shared": setting.shared, "names": [c.name for c in contestants]})[:16]
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
        "reflection": "none",
        "seeds": [setting.seed],
        "n_asked": setting.count,
        "n_done": setting.count,
        "device": setting.device,
        "wall_time_s": time.monotonic() - started,
        "versions": versions(),
        "commit": commit(),
    }
    of = {c.name: (c.name,) for c in contestants} | {name: pair for name, (_, pair) in pairs.items()}
    described = {c.name: {"kind": "system", "name": c.name} | c.cell for c in contestants}
    described |= {name: {"kind": kind, "name": name, "of": list(pair)} for name, (kind, pair) in pairs.items()}
    records = []
    for name, members in of.items():
        first = made[members[0]]
        own = {
            "systems": {m: System(reference=made[m].reference, weights_sha256=made[m].weights_sha256) for m in members},
            "solver": first.solver,
            "grid": list(first.grid),
            "guidance_scale": first.guidance_scale,
        }
        nfe = {name: first.nfe} if len(members) == 1 and first.nfe is not None else {}
        records += save_cells(common | own, {name: described[name]}, estimates, nfe, out)
    del features, cells
    shutil.rmtree(work, ignore_errors=True)
    return records


def _features(
    contestant: Contestant, extractors: Extractors, setting: Setting, work: Path, made: dict[str, Made]
) -> Iterator[Features]:
    """Features of a contestant's batches in their order; those done lie in ``work``. Extraction runs beside the drawing."""
    how, batches = contestant.open()
    made[contestant.name] = how
    place = work / content_hash(asdict(how) | {"keep": str(contestant.keep), "cell": contestant.cell})[:16]
    keeper = None if contestant.keep is None else Keeper(contestant.keep, how)
    paths = [place / f"{index:06d}.npz" for index in range(len(batches))]

    def drawn() -> Iterator[tuple[Path, Batch | None]]:
        for index, path in enumerate(paths):
            yield path, None if path.is_file() else batches[index]

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
    found = cells.estimates(single)
    pairs: Pairs = {f"{a} − {b}": ("difference", (a, b)) for a, b in differences}
    for a, b in leaders(found):
        if (a, b) not in [pair for _, pair in pairs.values()] and (b, a) not in [pair for _, pair in pairs.values()]:
            pairs[f"{a} − {b}"] = ("pair", (a, b))
    if pairs:
        found |= cells.estimates({name: single[a] - single[b] for name, (_, (a, b)) in pairs.items()})
    return found, pairs


def leaders(found: Mapping[str, Mapping[str, Estimate]]) -> list[tuple[str, str]]:
    """The best and the next best in each metric, each pair once."""
    pairs = []
    for metric in next(iter(found.values())):
        sign = -1 if METRICS[metric].direction == "higher" else 1
        order = sorted(found, key=lambda name: sign * found[name][metric].value)
        pairs += [(order[0], order[1])] if len(order) > 1 else []
    return list(dict.fromkeys(pairs))
