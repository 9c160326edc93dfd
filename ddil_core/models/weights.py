"""Weights on disk: the headers of safetensors files, and the files that a pipeline needs.

This file loads no weight and does not import torch. So a damaged file is named before a library reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.outside import DESCRIPTION, NotPlain, inside, parse_json, read_file
from ddil_core.support.paths import shown

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are not used, and so neither fetched nor loaded."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Endings of pickles. Reading a pickle can run code, so only ``ddil models convert`` opens one."""

LIBRARIES = ("diffusers", "transformers", "ddil_core.gaussians.networks")
"""The modules that a pipeline's classes may come from."""

_WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "Processor", "FeatureExtractor")
AGAIN = "fetch or make the model again"
"""The end of a message about damage."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a header: its safetensors dtype (``F32``, ``BF16`` …) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        bits = re.search(r"\d+", self.dtype)  # only BOOL has no number; an element takes a byte
        return self.numel * (int(bits.group()) if bits else 8) // 8


@dataclass(frozen=True)
class PipelineFiles:
    """The files of a pipeline's weights.

    Attributes:
        folder: The pipeline's folder.
        variant: The chosen variant. None: the plain files.
        components: The files of each component.
    """

    folder: Path
    variant: str | None
    components: dict[str, tuple[Path, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of the files on disk."""
        return sum(path.stat().st_size for files in self.components.values() for path in files)


def read_header(path: Path) -> dict[str, Entry]:
    """Return dtype and shape of each tensor of a safetensors file. Check the file's length.

    Raises:
        DdilError: there is no such file, or the file is cut short or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DdilError(f"the weights {path} are not there; {AGAIN}")
    try:
        with safe_open(path, framework="np") as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
            return {name: Entry(part.get_dtype(), tuple(part.get_shape())) for name, part in slices}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DdilError(f"the weights {path} are cut short or damaged ({reason}); {AGAIN}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file that :func:`read_header` has checked."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return dict(file.metadata() or {})


def read_index(folder: Path) -> dict[str, Any]:
    """Read ``model_index.json``. It maps each component to [library, class] and holds the pipeline's own keys."""
    return read_json(folder / "model_index.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model.

    Raises:
        DdilError: the file is missing or damaged, is too large, or has a key twice.
    """
    try:
        content = parse_json(read_file(path, DESCRIPTION))
    except FileNotFoundError as error:
        raise DdilError(f"the file {path} of the model is not there; {AGAIN}") from error
    except NotPlain as error:
        raise DdilError(f"the file {path} of the model {error}; {AGAIN}") from error
    except (ValueError, OSError) as error:
        raise DdilError(f"the file {path} of the model is damaged; {AGAIN}") from error
    if not isinstance(content, dict):
        raise DdilError(f"the file {path} of the model is damaged; {AGAIN}")
    return content


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return (library, class) of each component of a pipeline that is used here.

    Raises:
        DdilError: a component is no name of a folder beside the file, or its library or class is no text.
    """
    for name, value in index.items():
        named = isinstance(value, list) and None not in value  # [null, null] and [null, true] stand for none
        if named and not (re.fullmatch(r"\w+", name) and all(isinstance(part, str) for part in value)):
            raise DdilError(f"the file model_index.json of the model has the damaged component {shown(name)}; {AGAIN}")
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and None not in value and name not in UNUSED
    }


def has_weights(class_name: str) -> bool:
    """Return whether a component of this class is a network, not a scheduler, tokenizer or processor."""
    return not any(word in class_name for word in _WITHOUT_WEIGHTS)


def count(paths: Iterable[Path]) -> int:
    """Count the parameters in safetensors files."""
    return sum(entry.numel for path in paths for entry in read_header(path).values())


def network_folders(folder: Path, reference: str) -> dict[str, Path]:
    """Return the folder of each network of a pipeline. Check that the folders of all components are here.

    Raises:
        DdilError: one is missing, or a component is of a class that is not loaded.
    """
    networks = {}
    for name, (library, class_name) in components(read_index(folder)).items():
        if library not in LIBRARIES:
            raise DdilError(
                f"the component {name} of the model {reference!r} is of the class {library}.{class_name}, and only "
                f"classes of {' and '.join(LIBRARIES)} are loaded, so that no code of a model runs"
            )
        if not (folder / name).is_dir():
            raise DdilError(
                f"the model {reference!r} names the component {name} ({class_name}), and there is no folder "
                f"{folder / name}; {AGAIN}"
            )
        if has_weights(class_name):
            networks[name] = folder / name
    return networks


def pipeline_files(folder: Path, reference: str, variant: str | None = None) -> PipelineFiles:
    """Choose the files of weights that a pipeline loads, and check that each is here and whole.

    Args:
        folder: The pipeline's folder.
        reference: The name of the model in messages.
        variant: The preferred set of weights, such as ``fp16``. A component without it takes its plain files, as in
            diffusers. None: the plain files, or the only variant if a component has no plain files.

    Raises:
        WrongCommand: no component has the variant.
        DdilError: a component, a shard or a file is missing, cut short or damaged, or only pickles are here.
    """
    networks = network_folders(folder, reference)
    here = {name: sets_of_weights([path.name for path in folder.iterdir()]) for name, folder in networks.items()}
    known = sorted({name for sets in here.values() for name in sets if name is not None})
    if variant is not None and variant not in known:
        choice = f"it has {', '.join(known)}" if known else "it has only the plain files"
        raise WrongCommand(f"the model {reference!r} has no weights of the variant {variant!r} here; {choice}")
    if variant is None and len(known) == 1 and any(None not in sets for sets in here.values()):
        variant = known[0]
    files = {}
    for name, path in networks.items():
        chosen = here[name].get(variant) or here[name].get(None)
        if chosen is None:
            raise DdilError(_no_weights(path, f"the component {name} of the model {reference!r}", known))
        files[name] = _shards(path, chosen)
    for paths in files.values():
        for path in paths:
            read_header(path)
    return PipelineFiles(folder, variant, files)


def sets_of_weights(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Sort the names of files in a component's folder by variant. None is the plain variant.

    A variant has one whole file, or an index and its shards, named as diffusers and transformers name them:
    ``model.fp16.safetensors``, ``model-00001-of-00002.safetensors`` …
    """
    whole: dict[str | None, list[str]] = {}
    parts: dict[str | None, list[str]] = {}
    stem, number = "(?:diffusion_pytorch_model|model)", r"-\d+-of-\d+"
    for name in sorted(names):
        if match := re.fullmatch(rf"{stem}(?:\.(\w+))?\.safetensors", name):
            whole[match[1]] = [name]
        elif match := re.fullmatch(rf"{stem}(?:\.(\w+))?{number}(?:\.(\w+))?\.safetensors", name):
            parts.setdefault(match[1] or match[2], []).append(name)
        elif match := re.fullmatch(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json", name):
            parts.setdefault(match[1], []).append(name)
    sharded = {variant: files for variant, files in parts.items() if any(".index." in file for file in files)}
    return sharded | whole


def _shards(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """Return the safetensors of a set. If there is an index, return all shards that it names, here or not."""
    index = next((folder / name for name in names if name.endswith(".json")), None)
    if index is None:
        return tuple(folder / name for name in names)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise DdilError(f"the file {index} of the model is damaged; {AGAIN}")
    files = set(map(str, shards.values()))
    for name in sorted(files):
        if not inside(name) or not name.endswith(".safetensors"):
            raise DdilError(f"the file {index} of the model names {shown(name)}, which is no shard beside it; {AGAIN}")
    return tuple(folder / name for name in sorted(files))


def _no_weights(folder: Path, owner: str, variants: list[str]) -> str:
    if variants:
        choice = ", ".join(variants)
        return f"{owner} has no plain weights in {folder}, and the variants here are {choice}; choose with --variant"
    pickle = next((path for path in sorted(folder.iterdir()) if path.suffix in PICKLES), None)
    if pickle is None:
        return f"{owner} has no weights in {folder}; {AGAIN}"
    return (
        f"{owner} has its weights only as a pickle ({pickle}), and a pickle can run code; make a copy in safetensors "
        "with: ddil models convert FOLDER OUT"
    )
