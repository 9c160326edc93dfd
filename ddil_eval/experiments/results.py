"""Estimates to records: what every experiment writes the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ddil_core
import ddil_eval
from ddil_core.models.model import Model
from ddil_core.support.protocol import content_hash
from ddil_core.support.provenance import commit, versions
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record, RecordedMetric, save_record
from ddil_eval.statistics import Estimate


def provenance(*, protocol: dict[str, Any], systems: Mapping[str, Model], **rest: Any) -> dict[str, Any]:
    """The part of a record that all cells of a measurement share; ``rest`` are further fields of ``Record``."""
    described = {
        role: {"reference": model.reference, "weights_sha256": model.weights_sha256()}
        for role, model in systems.items()
    }
    shared = {"protocol": protocol, "protocol_hash": content_hash(protocol), "systems": described}
    return shared | {"versions": versions(), "commit": commit()} | rest


def save_cells(
    common: dict[str, Any],
    cells: Mapping[str, dict[str, Any]],
    estimates: Mapping[str, Mapping[str, Estimate]],
    nfe: Mapping[str, float],
    out: Path,
) -> list[Record]:
    """One record for every cell, saved below ``out``; ``cells``, ``estimates`` and ``nfe`` share their keys."""
    records = []
    for key, cell in cells.items():
        metrics = {name: recorded_metric(name, estimate) for name, estimate in estimates[key].items()}
        record = Record.model_validate(common | {"cell": cell, "nfe": nfe.get(key), "metrics": metrics})
        save_record(record, out)
        records.append(record)
    return records


def recorded_metric(metric: str, estimate: Estimate) -> RecordedMetric:
    """An estimate as records hold it, with its metric's direction, kind and network."""
    row = METRICS[metric]
    network = row.network.identity()
    return RecordedMetric.model_validate(
        {"estimate": estimate, "direction": row.direction, "kind": row.kind, "network": network}
    )


@cache
def code_sha256() -> str:
    """A hash of the two packages' sources: what was computed by other code is not taken for this one's."""
    found = hashlib.sha256()
    for package in (ddil_core, ddil_eval):
        (folder,) = package.__path__
        for path in sorted(Path(folder).rglob("*.py")):
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
