"""The rows of a comparison, from images to features. All processes draw together, and each row is drawn once.

The features of a row lie in ``out/features``, in a folder named by a hash of all that they depend on: one file for each
network, and ``key.json``, which describes the row. Each batch lies in ``out/partial`` until all batches of its row are
done. Both folders can be deleted safely.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddil_core.data.base import DataSet
from ddil_core.support import ranks
from ddil_core.support.devices import beside
from ddil_core.support.errors import DdilError
from ddil_core.support.files import replacing, write_text
from ddil_core.support.progress import progress
from ddil_core.support.protocol import content_hash
from ddil_core.support.provenance import versions
from ddil_eval.experiments.image_batches import ImageBatch
from ddil_eval.experiments.image_sources import ImageOrigin, ImageSource, ImageWriter
from ddil_eval.experiments.results import code_sha256
from ddil_eval.features.extraction import Extractors, map_ahead
from ddil_eval.features.recipes import Recipe
from ddil_eval.features.storage import Features, cached_arrays, gather_features, read_features
from ddil_eval.statistics.moments import blocks


@dataclass(frozen=True)
class System:
    """A row of a comparison, or a student of one training seed, of which a row has several.

    Attributes:
        name: The name of the system.
        open: Loads the source of the row's images.
        cell: What the cell of its record holds beside kind, name and steps.
        row: The name of the row, where it has several systems. They follow one another.
    """

    name: str
    open: Callable[[], ImageSource]
    cell: dict[str, Any] = field(default_factory=dict)
    row: str | None = None


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison share.

    Attributes:
        protocol: The resolved configuration.
        not_hashed: Keys of the protocol that no row's numbers depend on.
        recipe: How images are prepared.
        reference: The data set that images are compared with.
        num_reference_images: How many of its images.
        data: What records say of the data set and of the prompts.
        count: The number of prompts.
        batch_size: The number of images in a batch.
        seed: The seed of the noise, and of the jackknife's groups.
        device: The device of this process.
    """

    protocol: dict[str, Any]
    not_hashed: frozenset[str]
    recipe: Recipe
    reference: DataSet
    num_reference_images: int
    data: dict[str, Any]
    count: int
    batch_size: int
    seed: int
    device: str

    @property
    def label(self) -> str:
        """The recipe's label in records."""
        return self.recipe.label(self.count, self.num_reference_images)


@dataclass(frozen=True)
class SystemFeatures:
    """A system that is drawn, by this process and others.

    Attributes:
        name: The name of the system.
        origin: How its images were made.
        key: All that its features depend on.
        files: The file of the features of each network.
        batches: The files of its batches, which lie there until ``files`` are written.
        writer: Keeps the images, where they are kept.
    """

    name: str
    origin: ImageOrigin
    key: dict[str, Any]
    files: dict[str, Path]
    batches: tuple[Path, ...]
    writer: ImageWriter | None

    @property
    def is_whole(self) -> bool:
        """Whether the features of all batches are gathered."""
        return all(path.is_file() for path in self.files.values())


def draw_row(system: System, extractors: Extractors, setting: Setting, out: Path) -> SystemFeatures:
    """Draw this process's share of a row's batches, and skip what is done.

    A second thread waits for the images and extracts the features. So a GPU has the next batch when it ends one.
    """
    source = system.open()
    batches, writer = source.batches, source.writer
    key = _key(source.origin, extractors, setting, batches.number)
    name = content_hash(key)[:16]
    files = {network: out / "features" / name / f"{network}.npy" for network in extractors.networks}
    paths = tuple(out / "partial" / name / f"{index:06d}.npz" for index in range(len(batches)))
    row = SystemFeatures(system.name, source.origin, key, files, paths, writer)
    size, whole, share = batches.per_batch, row.is_whole, ranks.mine(len(paths))
    prompts = {index: min(size, setting.count - index * size) for index in share}
    todo = [
        index for index in share
        if not (whole or paths[index].is_file())
        or (writer is not None and not writer.has(index * size, prompts[index]))
    ]  # fmt: skip

    def draw() -> Iterator[tuple[int, ImageBatch]]:
        for index in todo:
            yield index, batches[index]

    def extract(item: tuple[int, ImageBatch]) -> int:
        index, batch = item
        if writer is not None:
            writer.keep(batch)
        if not whole:
            with beside(setting.device, "features"):
                cached_arrays(paths[index], lambda: extractors(batch.images, batch.captions))
        return prompts[index]

    total = sum(prompts.values())
    with progress(system.name, total, done=total - sum(prompts[index] for index in todo)) as advance:
        for count in map_ahead(draw(), extract):
            advance(count)
    return row


def collect(row: SystemFeatures, count: int) -> Features:
    """Gather the features of a row, delete the files of its batches, and write the index of kept images.

    Returns:
        Features [count, d] by network, memory-mapped.

    Raises:
        DdilError: a batch is missing, or a file is damaged.
    """
    if not row.is_whole:
        absent = [path for path in row.batches if not path.is_file()]
        if absent:
            raise DdilError(
                f"{len(absent)} of {len(row.batches)} batches of {row.name!r} are not in {absent[0].parent}; --out "
                "must be one folder for all processes"
            )
        gather_features(
            (cached_arrays(path, dict) for path in row.batches),
            count,
            {name: f.parent for name, f in row.files.items()},
        )
        folder = next(iter(row.files.values())).parent
        write_text(folder / "key.json", json.dumps({"name": row.name} | row.key, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(row.batches[0].parent, ignore_errors=True)
    if row.writer is not None:
        row.writer.close()
    return {name: read_features(path, count, f"features of {row.name!r}") for name, path in row.files.items()}


def join_features(rows: Sequence[Features], count: int, folder: Path) -> Features:
    """Write the features of several rows one after another, into files of a temporary ``folder``."""
    parts = ({name: held[block] for name, held in row.items()} for row in rows for block in blocks(count))
    return gather_features(parts, count * len(rows), folder, writing=replacing)


def _key(origin: ImageOrigin, extractors: Extractors, setting: Setting, number: int) -> dict[str, Any]:
    """Collect all that the features of a row depend on. Its keys are hashed and must not change."""
    preparation = setting.recipe.model_dump(mode="json", exclude={"name", "source", "metrics", "images", "reference"})
    return {
        "made": origin.described(),
        "prompts": {key: setting.data[key] for key in ("prompt_ids_sha256", "captions_sha256")},
        "pictures_per_prompt": number,
        "preparation": preparation,
        "networks": extractors.identity(),
        "batch_size": setting.batch_size,
        "versions": versions(),
        "code_sha256": code_sha256(),
    }
