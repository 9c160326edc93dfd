"""The models that have a name, with their sources, sizes and states; and the number of parameters of any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddil_core.models.hub import HubPart
from ddil_core.models.references import SHIPPED, check_files, hub_parts, resolve
from ddil_core.models.system_specs import load_systems
from ddil_core.models.weights import count, read_header
from ddil_core.support.errors import DdilError

UNVERIFIED = "unverified"
"""Stands for a fact that nobody read at its source."""

SHIPPED_LICENCE = "apache-2.0"
"""The licence of the models that come with the package."""

_SINGLE_FILE_PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.": "text_encoder",
}
"""First words of a weight's name in a single-file checkpoint, and the component of the weight."""


def list_models() -> list[dict[str, Any]]:
    """List the named models. ``bytes`` counts the files on this machine, interrupted downloads included."""
    rows = []
    for name, shipped in SHIPPED.items():
        row = {
            "description": shipped.description,
            "source": "shipped with the package",
            "revision": "shipped",
            "licence": SHIPPED_LICENCE,
            "bytes": _bytes_in(shipped.folder),
        }
        rows.append({"name": name, **row, **_state(name)})
    for name, system in load_systems().items():
        parts = hub_parts(name)
        row = {
            "description": system.title,
            "source": " + ".join(_source(part) for part in parts) or None,
            "revision": system.revision or UNVERIFIED,
            "licence": system.licence or UNVERIFIED,
            "bytes": sum(_bytes_of(part) for part in parts),
        }
        rows.append({"name": name, **row, **_state(name)})
    return rows


def parameters(reference: str, variant: str | None = None) -> tuple[Path, dict[str, int]]:
    """Return the folder of a model's configuration, and each component's number of parameters from the headers."""
    files = resolve(reference)
    weights = check_files(files, reference, variant)
    if files.checkpoint is None:
        return files.folder, {name: count(paths) for name, paths in weights.components.items()}
    counts = dict.fromkeys(_SINGLE_FILE_PREFIXES.values(), 0)
    for name, entry in read_header(files.checkpoint).items():
        for prefix, component in _SINGLE_FILE_PREFIXES.items():
            counts[component] += entry.numel if name.startswith(prefix) else 0
    return files.folder, counts


def _state(name: str) -> dict[str, bool | str]:
    """Say whether a named model's files are all here and whole. If not, say what to do."""
    try:
        check_files(resolve(name), name)
    except DdilError as error:
        return {"here": False, "needs": str(error).removeprefix(f"the model {name!r} ")}
    return {"here": True, "needs": ""}


def _source(part: HubPart) -> str:
    return f"{part.repository.name}/{part.file}" if part.file else part.repository.name


def _bytes_of(part: HubPart) -> int:
    path, interrupted = part.path(), part.repository.interrupted_bytes()
    if path is None:
        folder = None if part.file else part.repository.snapshot()
        return interrupted + (0 if folder is None else _bytes_in(folder))
    return interrupted + (path.stat().st_size if part.file else _bytes_in(path))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
