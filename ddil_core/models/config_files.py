"""What the configurations of a model's components may not ask of the libraries: code, kernels or files from elsewhere.

transformers and diffusers act on some keys of a ``config.json``: they import classes that ``auto_map`` names, fetch a
kernel that ``_attn_implementation`` names from a hub, and hand weights to the package that a ``quantization_config``
names. No model that is supported here needs any of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddil_core.models.weights import AGAIN, components, read_index, read_json
from ddil_core.support.errors import DdilError
from ddil_core.support.misfits import value_text

CODE = (
    "auto_map", "custom_pipelines", "kernel_config", "quantization_config", "transformers_weights",
    "trust_remote_code", "use_kernels",
)  # fmt: skip
"""Keys that ask for code, kernels or weights from elsewhere. They may be absent, null, false or empty."""

KERNELS = ("attn_implementation", "experts_implementation")
"""Keys, with and without ``_`` before and ``_internal`` after, that name the kernel of an operation."""

OWN_KERNELS = (None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
"""The kernels that come with torch and transformers."""

MOST_REPEATED = 1_000
"""The most layers or blocks of a network, and the longest list in a configuration. A network is built by them."""
MOST_TIMESTEPS = 100_000
"""The most training timesteps of a scheduler. Models have 1,000."""

ADAPTER = "adapter_config.json"
"""The file by which transformers looks for an adapter, and for its base in another place."""


def require_plain_configs(folder: Path, reference: str) -> None:
    """Refuse a pipeline whose configurations ask the libraries for code, kernels or files from elsewhere.

    Args:
        folder: The pipeline's folder.
        reference: The name of the model in messages.

    Raises:
        DdilError: a configuration does, or it is damaged. The message names the file and the key.
    """
    for name in components(read_index(folder)):
        part = folder / name
        if (part / ADAPTER).exists():
            raise DdilError(
                f"the component {name} of the model {reference!r} has the file {part / ADAPTER}, by which libraries "
                "load weights from another place; remove it, and name a LoRA as a system's LoRA"
            )
        for path in sorted(part.glob("*config.json")):
            config = read_json(path)
            for key, value in _settings(config):
                if key in CODE and value:
                    raise _refused(path, key, value, "asks for code or weights from elsewhere")
                if key.removeprefix("_").removesuffix("_internal") in KERNELS and not _own(value):
                    raise _refused(path, key, value, "names a kernel from elsewhere")
                if not _bounded(key, value):
                    raise DdilError(
                        f"the file {path} of the model has a number or a list at {key!r} that no model has "
                        f"({value_text(value)}); {AGAIN}"
                    )


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key and value of a configuration, and of those inside it, such as ``text_config``."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _settings(value)


def _own(value: Any) -> bool:
    """Whether a value names kernels of torch and transformers alone. A mapping names one for each part of a model."""
    if isinstance(value, Mapping):
        return all(map(_own, value.values()))
    return value is None or (isinstance(value, str) and value in OWN_KERNELS)


def _bounded(key: str, value: Any) -> bool:
    """Whether a value leads to no endless work while a library builds the network."""
    if isinstance(value, list):
        return len(value) <= MOST_REPEATED and all(_bounded(key, item) for item in value)
    if type(value) is not int:
        return True
    if key == "num_train_timesteps":
        return value <= MOST_TIMESTEPS
    repeats = ("layers" in key or "blocks" in key or key.endswith("per_block")) and "dim" not in key
    return not repeats or value <= MOST_REPEATED


def _refused(path: Path, key: str, value: Any, why: str) -> DdilError:
    return DdilError(
        f"the file {path} of the model has the key {key!r}, which {why} ({value_text(value)}); nothing was run or "
        f"fetched: remove the key, or {AGAIN}"
    )
