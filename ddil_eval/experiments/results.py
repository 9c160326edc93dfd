"""Estimates to records: the one builder of records, which every experiment uses."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import ddil_core
import ddil_eval
from ddil_core.support import ranks
from ddil_core.support.commented import commented
from ddil_core.support.compute import without_defaults
from ddil_core.support.files import write_text
from ddil_core.support.protocol import content_hash
from ddil_core.support.provenance import commit, versions
from ddil_core.support.size import without_own_size
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record, RecordedMetric, RecordedModel, save_record
from ddil_eval.statistics import Estimate

NOT_NAMED = ("batch_size", "chunk", "draw_batch_size")
"""Keys that do not name a folder of figures. A run that differs in these alone replaces its figures."""


@dataclass(frozen=True)
class RecordWriter:
    """Builds and saves the records of one run of an experiment.

    Attributes:
        out: The results folder.
        shared: The fields of ``Record`` that are the same in all cells.
    """

    out: Path
    shared: Mapping[str, Any]

    @classmethod
    def of_run(
        cls,
        out: Path,
        *,
        experiment: str,
        protocol: Mapping[str, Any],
        not_hashed: Iterable[str],
        data: Mapping[str, Any],
        recipe: str,
        count: int,
        device: str,
        started: float,
    ) -> RecordWriter:
        """Collect what all cells of a run share.

        Args:
            out: The results folder.
            experiment: The name of the experiment.
            protocol: The resolved configuration.
            not_hashed: Keys of the protocol that no number of a cell depends on; the protocol's hash leaves them out.
            data: What the record says of the data set.
            recipe: The label of the recipe.
            count: The number of prompts or images that were measured.
            device: The device of this process.
            started: ``time.monotonic()`` at the start of the run.
        """
        shared = {
            "experiment": experiment,
            "protocol": protocol,
            "protocol_hash": content_hash(hashed(protocol, not_hashed)),
            "data": data,
            "recipe": recipe,
            "n_asked": count,
            "n_done": count,
            "device": ranks.described(device),
            "wall_time_s": time.monotonic() - started,
            "versions": versions(),
            "commit": commit(),
        }
        return cls(out, shared)

    def save(self, cell: Mapping[str, Any], metrics: Mapping[str, RecordedMetric], **fields: Any) -> Record:
        """Build the record of one cell, and save it below ``out``.

        Args:
            cell: What places the record in a table.
            metrics: The estimates by the metric's name.
            fields: Further fields of ``Record``, which differ from cell to cell.
        """
        record = Record.model_validate({**self.shared, **fields, "cell": cell, "metrics": metrics})
        save_record(record, self.out)
        return record


def hashed(protocol: Mapping[str, Any], not_hashed: Iterable[str]) -> dict[str, Any]:
    """Return what the hash of a protocol covers: no key of ``not_hashed``, and no default of compute or size."""
    left_out = set(not_hashed)
    return without_own_size(without_defaults({key: value for key, value in protocol.items() if key not in left_out}))


def figures_folder(config: BaseModel, out: Path, name: str = "") -> Path:
    """Return the folder of the figures of a run, ``out/EXPERIMENT/KEY``. The key is of the settings.

    Runs with other settings, or of other models, have other folders, so that none replaces the figures of another. The
    same command again replaces its own.

    Args:
        config: The configuration of an experiment.
        out: The results folder.
        name: What the folder's name begins with.
    """
    content = config.model_dump(mode="json", exclude=set(NOT_NAMED), exclude_defaults=True)
    experiment = str(config.model_dump(include={"experiment"})["experiment"])
    key = content_hash(content)[:8]
    return out / experiment / (f"{name}-{key}" if name else key)


def keep_protocol(config: BaseModel, folder: Path) -> None:
    """Write the configuration beside figures, so that they can be made again."""
    write_text(folder / "protocol.yaml", commented(config))


def origin_fields(systems: Sequence[tuple[str, ImageOrigin]]) -> dict[str, Any]:
    """Return the fields of ``Record`` that say how the images of a cell were made.

    A cell of two systems is their difference. It has the sampling of the first, and no cost of its own.
    """
    first, alone = systems[0][1], len(systems) == 1
    return {
        "systems": {
            name: RecordedModel(reference=origin.reference, weights_sha256=origin.weights_sha256)
            for name, origin in systems
        },
        "solver": first.solver,
        "grid": list(first.grid),
        "guidance_scale": first.guidance_scale,
        "reflection": first.reflection,
        "compute": first.compute,
        "size": first.size,
        "pictures_sha256": first.pictures_sha256 if alone else None,
        "nfe": first.nfe if alone else None,
        "seeds": sorted({origin.seed for _, origin in systems if origin.seed is not None}),
    }


def recorded_metrics(estimates: Mapping[str, Estimate]) -> dict[str, RecordedMetric]:
    """Return estimates as records hold them, each with its metric's direction, kind and network."""
    return {name: recorded_metric(name, estimate) for name, estimate in estimates.items()}


def recorded_metric(metric: str, estimate: Estimate) -> RecordedMetric:
    """Return one estimate as records hold it, with its metric's direction, kind and network."""
    row = METRICS[metric]
    network = row.network.identity()
    return RecordedMetric.model_validate(
        {"estimate": estimate, "direction": row.direction, "kind": row.kind, "network": network}
    )


@cache
def code_sha256() -> str:
    """Return a hash of the source files of both packages, so that features of other code are not used again."""
    sha256 = hashlib.sha256()
    for package in (ddil_core, ddil_eval):
        (folder,) = package.__path__
        for path in sorted(Path(folder).rglob("*.py")):
            sha256.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return sha256.hexdigest()
