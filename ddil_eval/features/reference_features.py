"""Features of reference images, computed once and stored in the user's folder under a hash of their inputs."""

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
    """Return the features [count, d] of a data set's first images, by network: read from the store, else extracted.

    Features of networks without weights are not stored: such networks are fast, and nothing identifies their code.

    Args:
        data: The data set.
        count: The number of images.
        recipe: A hash of how images are prepared.
        networks: The networks by name.
        extract: Takes names of networks and yields batches of their features.

    Returns:
        Features by network. Stored ones are memory-mapped.

    Raises:
        DdilError: the data set has fewer images, or a stored file is damaged.
    """
    stored = {name: network for name, network in networks.items() if network.weights}
    content = content_sha256(data, count) if stored else ""
    keys = {name: _key(content, count, recipe, network) for name, network in stored.items()}
    folders = {name: references_folder() / digest(key)[:32] for name, key in keys.items()}

    def absent() -> list[str]:
        return [name for name in networks if name not in folders or not (folders[name] / f"{name}.npy").is_file()]

    if stored and set(absent()) & set(folders):
        require_cache()
    with ExitStack() as stack:
        for folder in sorted({folders[name] for name in absent() if name in folders}):
            stack.enter_context(waiting_for(folder))  # another command may be extracting the same features
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
    """Return all that the features depend on. Its hash names their folder."""
    return {
        "pictures_sha256": content,
        "count": count,
        "recipe": recipe,
        "network": network.identity(),
        "reader": READER,
    }


def _extracted(names: Sequence[str], extract: Extract, count: int, folders: Mapping[str, Path]) -> Features:
    """Read the images once and extract with all networks. Write features to ``folders``; hold the others in memory."""
    if not names:
        return {}
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in names if name not in folders}

    def stream() -> Iterator[Features]:
        for part in extract(names):
            for name, collected in blocks.items():
                collected.append(part[name])
            yield {name: part[name] for name in folders}

    on_disk = gather_features(stream(), count, folders)
    in_memory = {name: np.concatenate(collected) for name, collected in blocks.items()}
    for name, features in in_memory.items():
        if len(features) != count:
            raise DdilError(f"the network {name} gave features of {len(features)} images, and {count} were expected")
    return on_disk | in_memory


def content_sha256(data: DataSet, count: int) -> str:
    """Return the SHA-256 of the first ``count`` images: the data set's ``images_sha256``, else that of the pixels."""
    images_sha256 = getattr(data, "images_sha256", None)
    if images_sha256 is not None:
        return str(images_sha256(count))
    pixels = hashlib.sha256()
    for images in data.images(count):
        for image in images:
            pixels.update(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    return pixels.hexdigest()


def references_folder() -> Path:
    """Return the folder of stored reference features. A hash of their inputs names each sub-folder."""
    return user_folder() / "references"
