"""Features of reference pictures, computed once: kept in the user's folder under the hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.base import DataSet
from ddil_core.data.images import READER
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.lock import waiting_for
from ddil_core.support.resources import require_cache, user_folder
from ddil_eval.features.storage import Features, gather_features, read_features
from ddil_eval.metrics import Network
from ddil_eval.report.records import digest

Extract = Callable[[Sequence[str]], Iterator[Features]]


def cached_reference_features(
    data: DataSet, count: int, recipe: str, networks: Mapping[str, Network], extract: Extract
) -> Features:
    """Features [count, d] of a data set's first pictures by network, memory-mapped: read where they are kept, else extracted.

    ``extract`` takes names of networks and yields batches of their features. Networks without weights are quick and may
    be a test's or a user's own, so theirs are not kept.

    Raises:
        DdilError: the data set has fewer pictures, or a kept file is damaged.
    """
    keyed = {name: network for name, network in networks.items() if network.weights}
    content = content_sha256(data, count) if keyed else ""
    keys = {name: _key(content, count, recipe, network) for name, network in keyed.items()}
    folders = {name: references_folder() / digest(key)[:32] for name, key in keys.items()}

    def absent() -> list[str]:
        return [name for name in networks if name not in folders or not (folders[name] / f"{name}.npy").is_file()]

    if keyed and set(absent()) & set(folders):
        require_cache()
    with ExitStack() as stack:
        for folder in sorted({folders[name] for name in absent() if name in folders}):
            stack.enter_context(waiting_for(folder))  # another command may be at the same features
        missing = absent()
        fresh = _extracted(missing, extract, count, {name: folders[name] for name in missing if name in folders})
        for name in set(missing) & set(folders):
            write_text(folders[name] / "key.json", json.dumps(keys[name], indent=2, ensure_ascii=False) + "\n")
    return {
        name: fresh[name]
        if name in fresh
        else read_features(folders[name] / f"{name}.npy", count, "reference features")
        for name in networks
    }


def _key(content: str, count: int, recipe: str, network: Network) -> dict[str, Any]:
    own = {"pictures_sha256": content, "count": count, "recipe": recipe, "network": network.identity()}
    return own | {"reader": READER}


def _extracted(names: Sequence[str], extract: Extract, count: int, folders: Mapping[str, Path]) -> Features:
    """One pass over the pictures for all networks: some to files, the others to memory."""
    if not names:
        return {}
    held: dict[str, list[np.ndarray]] = {name: [] for name in names if name not in folders}

    def stream() -> Iterator[Features]:
        for part in extract(names):
            for name, blocks in held.items():
                blocks.append(part[name])
            yield {name: part[name] for name in folders}

    on_disk = gather_features(stream(), count, folders)
    in_memory = {name: np.concatenate(blocks) for name, blocks in held.items()}
    for name, features in in_memory.items():
        if len(features) != count:
            raise DdilError(f"features of {len(features)} pictures came for {name} where {count} were asked for")
    return on_disk | in_memory


def content_sha256(data: DataSet, count: int) -> str:
    """SHA-256 of the first ``count`` pictures: what a data set says of its own files (``images_sha256``), else of the pixels."""
    own = getattr(data, "images_sha256", None)
    if own is not None:
        return str(own(count))
    found = hashlib.sha256()
    for images in data.images(count):
        for image in images:
            found.update(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    return found.hexdigest()


def references_folder() -> Path:
    """Where features of reference pictures lie, each under the hash of what it depends on."""
    return user_folder() / "references"
