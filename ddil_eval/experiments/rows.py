"""Rows of a comparison, from pictures to features: drawn by all processes together, and kept, so that no row is drawn twice.

A row's features lie in ``out/features`` under a hash of all that they depend on, a file for each network, with a ``key.json`` that
says which row it is. Until all of its batches are done each lies by itself in ``out/partial``. Deleting either folder is safe.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddil_core.data.base import DataSet
from ddil_core.support import ranks
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.progress import progress
from ddil_core.support.protocol import content_hash
from ddil_core.support.provenance import versions
from ddil_eval.experiments.image_sources import ImageBatch, ImageOrigin, ImageSource, ImageWriter
from ddil_eval.experiments.results import code_sha256
from ddil_eval.features.extraction import Extractors, map_ahead
from ddil_eval.features.recipes import Recipe
from ddil_eval.features.storage import Features, cached_arrays, gather_features, read_features
from ddil_eval.statistics.moments import blocks


@dataclass(frozen=True)
class System:
    """A row: ``open`` loads what its pictures come from, ``cell`` is what its record's cell says beside its name."""

    name: str
    open: Callable[[], ImageSource]
    cell: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all rows share. ``protocol`` is the whole of it, ``shared`` that part of it that a row's numbers depend on.

    ``count`` is the number of prompts, ``batch_size`` that of pictures at a time.
    """

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


@dataclass(frozen=True)
class SystemFeatures:
    """A row whose batches are done, by this process or another: how its pictures were made, and where its features lie."""

    name: str
    made: ImageOrigin
    key: dict[str, Any]
    files: dict[str, Path]
    batches: tuple[Path, ...]
    keeper: ImageWriter | None

    @property
    def is_whole(self) -> bool:
        return all(path.is_file() for path in self.files.values())


def draw_row(contestant: System, extractors: Extractors, setting: Setting, out: Path) -> SystemFeatures:
    """Draw this process's share of a row's batches, those that are not done yet. Extraction runs beside the drawing."""
    opened = contestant.open()
    batches, keeper = opened.batches, opened.keeper
    key = _key(opened.made, extractors, setting, batches.number)
    name = content_hash(key)[:16]
    files = {network: out / "features" / name / f"{network}.npy" for network in extractors.networks}
    paths = tuple(out / "partial" / name / f"{index:06d}.npz" for index in range(len(batches)))
    row = SystemFeatures(contestant.name, opened.made, key, files, paths, keeper)
    size, whole, own = batches.per_batch, row.is_whole, ranks.mine(len(paths))
    prompts = {index: min(size, setting.count - index * size) for index in own}
    todo = [
        index for index in own
        if not (whole or paths[index].is_file())
        or (keeper is not None and not keeper.has(index * size, prompts[index]))
    ]  # fmt: skip

    def drawn() -> Iterator[tuple[int, ImageBatch]]:
        for index in todo:
            yield index, batches[index]

    def extracted(item: tuple[int, ImageBatch]) -> int:
        index, batch = item
        if keeper is not None:
            keeper.keep(batch)
        if not whole:
            cached_arrays(paths[index], lambda: extractors(batch.images, batch.captions))
        return prompts[index]

    total = sum(prompts.values())
    with progress(contestant.name, total, done=total - sum(prompts[index] for index in todo)) as advance:
        for count in map_ahead(drawn(), extracted):
            advance(count)
    return row


def collect(row: SystemFeatures, count: int) -> Features:
    """All features [count, d] of a row by network, memory-mapped; what its batches were kept in until now is taken away.

    Raises:
        DdilError: a batch is not here, or a file is damaged.
    """
    if not row.is_whole:
        absent = [path for path in row.batches if not path.is_file()]
        if absent:
            raise DdilError(
                f"{len(absent)} of {len(row.batches)} batches of {row.name!r} are not in {absent[0].parent}; --out must be one "
                "folder for all processes"
            )
        gather_features(
            (cached_arrays(path, dict) for path in row.batches),
            count,
            {name: f.parent for name, f in row.files.items()},
        )
        folder = next(iter(row.files.values())).parent
        write_text(folder / "key.json", json.dumps({"name": row.name} | row.key, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(row.batches[0].parent, ignore_errors=True)
    if row.keeper is not None:
        row.keeper.close()
    return {name: read_features(path, count, f"features of {row.name!r}") for name, path in row.files.items()}


def join_features(rows: Sequence[Features], count: int, folder: Path) -> Features:
    """Several rows' features, one row after another, in files of ``folder``."""
    parts = ({name: held[block] for name, held in row.items()} for row in rows for block in blocks(count))
    return gather_features(parts, count * len(rows), folder)


def _key(made: ImageOrigin, extractors: Extractors, setting: Setting, number: int) -> dict[str, Any]:
    """All that a row's features depend on."""
    preparation = setting.recipe.model_dump(mode="json", exclude={"name", "source", "metrics", "images", "reference"})
    return {
        "made": asdict(made),
        "prompts": {key: setting.data[key] for key in ("prompt_ids_sha256", "captions_sha256")},
        "pictures_per_prompt": number,
        "preparation": preparation,
        "networks": extractors.identity(),
        "batch_size": setting.batch_size,
        "versions": versions(),
        "code_sha256": code_sha256(),
    }
