"""Weights on disk: what a safetensors file holds by its header, which files a pipeline needs, and whether they are whole.

Nothing here loads a weight or imports torch, so that a damaged pipeline is told by name before a library sees it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.support.errors import DdilError, WrongCommand

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that nothing here uses: they are neither asked for, nor fetched, nor loaded."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Files that hold a pickle, which can run code when it is read; only ``ddil models convert`` opens them."""

LIBRARIES = ("diffusers", "transformers")
"""Whose classes a pipeline may be made of."""

_WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "Processor", "FeatureExtractor")
AGAIN = "fetch or make the model again"
"""How a sentence about damage ends."""


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it: its safetensors dtype (``F32``, ``BF16`` …) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # BOOL alone has no number, and takes a byte
        return self.numel * (int(bits.group()) if bits else 8) // 8


@dataclass(frozen=True)
class PipelineFiles:
    """A pipeline's weights: the variant that was chosen (None: the plain files), and each component's files."""

    folder: Path
    variant: str | None
    components: dict[str, tuple[Path, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of the files on disk, through the links of a hub's cache."""
        return sum(path.stat().st_size for files in self.components.values() for path in files)


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of a safetensors file's tensors, from its header; the file's length is checked against it.

    Raises:
        DdilError: there is no such file, or it is cut short or otherwise damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DdilError(f"the weights {path} are not there; {AGAIN}")
    try:
        with safe_open(path, framework="np") as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 (the file is no mapping)
            return {name: Entry(part.get_dtype(), tuple(part.get_shape())) for name, part in slices}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DdilError(f"the weights {path} are cut short or damaged ({reason}); {AGAIN}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The notes in a safetensors file's header; the file was read with :func:`read_header` before."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return dict(file.metadata() or {})


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json``: each component's name to [library, class], and the pipeline's own keys."""
    return read_json(folder / "model_index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that belongs to a model.

    Raises:
        DdilError: it is not there or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DdilError(f"the file {path} of the model is not there; {AGAIN}") from error
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise DdilError(f"the file {path} of the model is damaged; {AGAIN}") from error


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The components of a pipeline that are used here, to (library, class)."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and None not in value and name not in UNUSED
    }


def has_weights(kind: str) -> bool:
    """Whether a component of the class ``kind`` is a network: schedulers, tokenizers and processors are none."""
    return not any(word in kind for word in _WITHOUT_WEIGHTS)


def count(paths: Iterable[Path]) -> int:
    """The number of parameters in safetensors files."""
    return sum(entry.numel for path in paths for entry in read_header(path).values())


def pipeline_files(folder: Path, reference: str, variant: str | None = None, *, weights: bool = True) -> PipelineFiles:
    """The weights that a pipeline loads, each one found and whole; without ``weights``, only whether its components are there.

    ``variant`` (such as ``fp16``) is taken where a component has it, and the plain files where it has not, as diffusers
    does. Without one the plain files are taken; where they are not here and one variant is, that variant.

    Raises:
        WrongCommand: no component has the variant that was asked for.
        DdilError: a component, a shard or a file is missing, cut short or damaged, or only pickles are there.
    """
    networks = {}
    for name, (library, kind) in components(read_index(folder)).items():
        if library not in LIBRARIES:
            raise DdilError(
                f"the component {name} of the model {reference!r} is of the class {library}.{kind}, and only those of "
                f"{' and '.join(LIBRARIES)} are loaded, so that no code of a model is run"
            )
        if not (folder / name).is_dir():
            raise DdilError(
                f"the model {reference!r} names the component {name} ({kind}), whose folder {folder / name} is not there; "
                f"{AGAIN}"
            )
        if has_weights(kind) and weights:
            networks[name] = folder / name
    if not weights:
        return PipelineFiles(folder, None, {})
    here = {name: sets_of_weights([path.name for path in folder.iterdir()]) for name, folder in networks.items()}
    known = sorted({one for found in here.values() for one in found if one is not None})
    if variant is not None and variant not in known:
        have = f"it has {', '.join(known)}" if known else "it has the plain files alone"
        raise WrongCommand(f"the model {reference!r} has no weights of the variant {variant!r} here; {have}")
    if variant is None and len(known) == 1 and any(None not in found for found in here.values()):
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
    """The weights in a component's folder by variant (None: the plain one): one whole file, or an index and its shards.

    Names are those that diffusers and transformers give: ``model.fp16.safetensors``, ``model-00001-of-00002.safetensors`` …
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
    return {variant: found for variant, found in parts.items() if any(".index." in name for name in found)} | whole


def _shards(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """A set's safetensors; where there is an index, those that it names, whether they are here or not."""
    index = next((folder / name for name in names if name.endswith(".json")), None)
    if index is None:
        return tuple(folder / name for name in names)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise DdilError(f"the file {index} of the model is damaged; {AGAIN}")
    return tuple(folder / name for name in sorted(set(shards.values())))


def _no_weights(folder: Path, whose: str, variants: list[str]) -> str:
    if variants:
        return f"{whose} has no plain weights in {folder}, and the variants here are {', '.join(variants)}; choose with --variant"
    pickle = next((path for path in sorted(folder.iterdir()) if path.suffix in PICKLES), None)
    if pickle is None:
        return f"{whose} has no weights in {folder}; {AGAIN}"
    return (
        f"{whose} has its weights as a pickle alone ({pickle}), and a pickle can run code; make a copy in safetensors with: "
        "ddil models convert FOLDER OUT"
    )
