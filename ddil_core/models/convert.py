"""Convert pickles of weights to safetensors, with checksums.

Pickles are read with ``weights_only``. What is written is whole, or nothing is.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.weights import PICKLES, read_index
from ddil_core.support.checksums import MANIFEST, with_checksum
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import write_tensors, write_text
from ddil_core.support.outside import DESCRIPTION, parse_json, read_file

if TYPE_CHECKING:
    from torch import Tensor

COPIED = (".json", ".txt", ".safetensors", ".model")
"""Endings of the files that are copied from a folder. The rest (code, other frameworks' weights) is left out."""

_NESTED = ("state_dict", "model", "module", "params", "ema")
"""Keys under which training programs store the weights, beside notes of their own."""

TOP = "."
"""The name of the part with the tensors at the top of a checkpoint."""


@dataclass(frozen=True)
class Converted:
    """A converted file.

    Attributes:
        source: The pickle.
        source_sha256: The SHA-256 of the pickle.
        out: The safetensors file.
        out_sha256: The SHA-256 of the safetensors file.
        tensors: The number of tensors.
        dropped: Names of what was left out.
    """

    source: str
    source_sha256: str
    out: str
    out_sha256: str
    tensors: int
    dropped: tuple[str, ...]


def convert_weights(source: Path, out: Path, part: str | None = None) -> list[Converted]:
    """Convert a pickle to a safetensors file, or a folder with pickles to a folder with safetensors.

    Args:
        source: The pickle or the folder.
        out: The file or folder to write.
        part: The set of weights to take from a pickle that holds several, such as ``ema`` or ``state_dict.model``.

    Raises:
        WrongCommand: there is nothing to convert, ``out`` exists or has the wrong ending, or the pickle holds several
            sets of weights and ``part`` names none of them.
        DdilError: a pickle needs more than tensors or is damaged. Nothing is written then.
    """
    if out.exists():
        raise WrongCommand(f"{out} exists and is not overwritten; name another")
    if source.is_dir():
        if part is not None:
            raise WrongCommand(
                f"{source} is a folder, and --part belongs to one file; convert the file that holds {part!r} by itself"
            )
        return _convert_folder(source, out)
    if not source.is_file():
        raise WrongCommand(f"there is no file or folder {source}")
    if source.suffix not in PICKLES:
        raise WrongCommand(
            f"{source} cannot be converted; name a file that ends in {', '.join(PICKLES)}, or a folder of such files"
        )
    if out.suffix != ".safetensors":
        raise WrongCommand(f"the file to write, {out}, must end in .safetensors")
    with with_checksum(out) as temporary:
        done = _convert_file(source, temporary, part)
    return [_named(done, source, out)]


def _convert_folder(source: Path, out: Path) -> list[Converted]:
    files = sorted(path for path in source.rglob("*") if path.is_file() and not _hidden(path.relative_to(source)))
    files = [path for path in files if path.name != MANIFEST]  # the copy gets its own
    if (source / "model_index.json").is_file():  # leave out what the pipeline does not name, such as a whole checkpoint
        components = {name for name, value in read_index(source).items() if isinstance(value, list)}
        files = [path for path in files if _belongs(path.relative_to(source), components)]
    pickles = [path for path in files if path.suffix in PICKLES and safetensors_path(path) not in files]
    if not pickles:
        raise WrongCommand(f"the folder {source} holds no {', '.join(PICKLES)} without a safetensors file beside it")
    if out.resolve().is_relative_to(source.resolve()):
        raise WrongCommand(f"{out} lies in {source}, the folder to convert; name a folder outside of it")
    done = []
    with with_checksum(out) as temporary:
        for path in files:
            place = temporary / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path in pickles:
                place = safetensors_path(place)
                done.append(_named(_convert_file(path, place), path, out / place.relative_to(temporary)))
            elif path.name.endswith(".bin.index.json"):
                if (index := safetensors_path(place)).name not in {
                    file.name for file in files if file.parent == path.parent
                }:
                    write_text(index, _converted_index(path))
            elif path.suffix in COPIED:
                shutil.copyfile(path, place)
    return done


def _belongs(path: Path, components: set[str]) -> bool:
    return path.parts[0] in components if len(path.parts) > 1 else path.suffix not in (*PICKLES, ".safetensors")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def safetensors_path(path: Path) -> Path:
    """Return the path where diffusers and transformers expect the safetensors of a pickle or of an index of shards."""
    name = re.sub(r"^pytorch_model(?=[.-])", "model", path.name)
    if name.endswith(".bin.index.json"):
        return path.with_name(name.removesuffix(".bin.index.json") + ".safetensors.index.json")
    return path.with_name(str(Path(name).with_suffix(".safetensors")))


def _converted_index(path: Path) -> str:
    try:
        index = parse_json(read_file(path, DESCRIPTION))
        index["weight_map"] = {
            weight: safetensors_path(Path(file)).name for weight, file in index["weight_map"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise DdilError(f"the index {path} is damaged; fetch or make the model again") from error
    return json.dumps(index, indent=2)


def _convert_file(source: Path, out: Path, part: str | None = None) -> Converted:
    tensors, dropped = read_pickle(source, part)
    write_tensors(out, own_memory(tensors), {"format": "pt"})
    return Converted(str(source), _sha256(source), str(out), _sha256(out), len(tensors), dropped)


def _named(done: Converted, source: Path, out: Path) -> Converted:
    return Converted(str(source), done.source_sha256, str(out), done.out_sha256, done.tensors, done.dropped)


def read_pickle(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a pickled checkpoint by name, and the names of what else it holds. Run no code of the file.

    ``part`` is as in :func:`convert_weights`.

    Raises:
        WrongCommand: the pickle holds several sets of weights and ``part`` names none of them.
        DdilError: the pickle needs a Python object other than tensors and plain containers, holds no tensors by name,
            or is damaged.
    """
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed is None:
            raise DdilError(f"{path} is damaged, or no checkpoint of PyTorch; get it again") from error
        raise DdilError(
            f"{path} asks for the Python object {needed[1]}, which could run code, and weights need none; nothing was "
            "run or written: get a copy in safetensors, or a copy that its author saved with weights only"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DdilError(
            f"{path} is cut short or damaged ({' '.join(str(error).split())[:120]}); get it again"
        ) from error
    return _tensors(content, path, part)


def _tensors(content: Any, path: Path, part: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of the part, or of the only set of weights, and the names of the rest."""
    parts = _parts(content)
    if not parts:
        raise DdilError(f"{path} holds no tensors by name, so there are no weights to convert")
    place = _only_set(content) if part is None else next((place for place in parts if _name(place) == part), None)
    if place is None:
        counts = ", ".join(f"{_name(place)} ({len(_own_tensors(tensors))})" for place, tensors in parts.items())
        problem = f"has no part {part!r}" if part is not None else "does not say which tensors are the weights"
        raise WrongCommand(
            f"{path} {problem}; choose a part, as in --part {_name(next(iter(parts)))}, of these (with their numbers "
            f"of tensors): {counts}"
        )
    dropped, inner = [], content
    for name in place:
        dropped += [str(other) for other in inner if other != name]
        inner = inner[name]
    tensors = _own_tensors(inner)
    return tensors, (*dropped, *(str(name) for name in inner if str(name) not in tensors))


def _only_set(content: Any) -> tuple[str, ...] | None:
    """Return the keys that lead to the only set of weights. None: there are several sets, or the keys are unknown."""
    place: tuple[str, ...] = ()
    while True:
        tensors = _own_tensors(content)
        inner = [name for name in _NESTED if _parts(content.get(name))]
        if not inner:
            return place if tensors else None
        # A single number beside nested weights is a note such as a step. Bytes are the state of a random generator.
        if len(inner) > 1 or any(tensor.numel() > 1 and tensor.is_floating_point() for tensor in tensors.values()):
            return None
        place, content = (*place, inner[0]), content[inner[0]]


def _parts(content: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Mapping[Any, Any]]:
    """Return every dictionary of a checkpoint that holds tensors by name, by the keys that lead to it."""
    if not isinstance(content, Mapping):
        return {}
    parts = {place: content} if _own_tensors(content) else {}
    for name, value in content.items():
        if isinstance(name, str):  # an optimiser numbers its tensors
            parts |= _parts(value, (*place, name))
    return parts


def _own_tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a dictionary, without those of the dictionaries in it."""
    import torch

    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _name(place: tuple[str, ...]) -> str:
    return ".".join(place) or TOP


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each contiguous and in memory of its own, as safetensors needs them."""
    taken: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in taken
        taken.add(storage.data_ptr())
        own[name] = tensor.detach() if whole else tensor.detach().contiguous().clone()
    return own


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
