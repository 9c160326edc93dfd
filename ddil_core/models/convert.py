"""Published pickles to safetensors: asked for by name, read with ``weights_only``, written whole or not at all."""

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
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import replacing, write_tensors, write_text

if TYPE_CHECKING:
    from torch import Tensor

COPIED = (".json", ".txt", ".safetensors", ".model")
"""What is taken along from a folder as it is. The rest (code, other frameworks' weights) is left behind."""

_NESTED = ("state_dict", "model", "module", "params", "ema")
"""Where training programs put the weights, beside their own notes."""

TOP = "."
"""What ``part`` calls the tensors that lie in no dictionary of their own."""


@dataclass(frozen=True)
class Converted:
    """A file that was read and the one that was written, with their SHA-256. ``dropped`` names what was left out."""

    source: str
    source_sha256: str
    out: str
    out_sha256: str
    tensors: int
    dropped: tuple[str, ...]


def convert_weights(source: Path, out: Path, part: str | None = None) -> list[Converted]:
    """Convert a pickle to one safetensors file, or a folder with pickles in it to a folder with safetensors in their place.

    Args:
        source: the pickle, or the folder.
        out: the file or folder to write.
        part: which set of weights to take of a pickle that holds several, such as ``ema`` or ``state_dict.model``.

    Raises:
        WrongCommand: nothing to convert, or ``out`` is there already or has the wrong ending; or the pickle holds several
            sets of weights and ``part`` names none of them.
        DdilError: a pickle asks for more than tensors, or is damaged; nothing is left behind.
    """
    if out.exists():
        raise WrongCommand(f"{out} is there already and is not overwritten; name another")
    if source.is_dir():
        if part is not None:
            raise WrongCommand(
                f"{source} is a folder, and a part is chosen of one file; convert the file {part!r} is in by itself"
            )
        return _convert_folder(source, out)
    if not source.is_file():
        raise WrongCommand(f"there is no file or folder {source}")
    if source.suffix not in PICKLES:
        raise WrongCommand(
            f"{source} is none of the files that are converted: {', '.join(PICKLES)}, or a folder of them"
        )
    if out.suffix != ".safetensors":
        raise WrongCommand(f"the file to write, {out}, must end in .safetensors")
    with replacing(out) as temporary:
        done = _convert_file(source, temporary, part)
    return [_named(done, source, out)]


def _convert_folder(source: Path, out: Path) -> list[Converted]:
    files = sorted(path for path in source.rglob("*") if path.is_file() and not _hidden(path.relative_to(source)))
    if (
        source / "model_index.json"
    ).is_file():  # what a pipeline does not name, as a whole checkpoint beside it, is none of it
        named = {name for name, value in read_index(source).items() if isinstance(value, list)}
        files = [path for path in files if _belongs(path.relative_to(source), named)]
    pickles = [path for path in files if path.suffix in PICKLES and renamed(path) not in files]
    if not pickles:
        raise WrongCommand(
            f"the folder {source} holds no {', '.join(PICKLES)} that has no safetensors beside it already"
        )
    if out.resolve().is_relative_to(source.resolve()):
        raise WrongCommand(f"{out} lies in {source}, which is what is converted; name a folder outside of it")
    done = []
    with replacing(out) as temporary:
        for path in files:
            place = temporary / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path in pickles:
                place = renamed(place)
                done.append(_named(_convert_file(path, place), path, out / place.relative_to(temporary)))
            elif path.name.endswith(".bin.index.json"):
                if (index := renamed(place)).name not in {one.name for one in files if one.parent == path.parent}:
                    write_text(index, _converted_index(path))
            elif path.suffix in COPIED:
                shutil.copyfile(path, place)
    return done


def _belongs(path: Path, components: set[str]) -> bool:
    return path.parts[0] in components if len(path.parts) > 1 else path.suffix not in (*PICKLES, ".safetensors")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def renamed(path: Path) -> Path:
    """Where diffusers and transformers look for the safetensors of a pickle, or of a pickle's index of shards."""
    name = re.sub(r"^pytorch_model(?=[.-])", "model", path.name)
    if name.endswith(".bin.index.json"):
        return path.with_name(name.removesuffix(".bin.index.json") + ".safetensors.index.json")
    return path.with_name(str(Path(name).with_suffix(".safetensors")))


def _converted_index(path: Path) -> str:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {weight: renamed(Path(file)).name for weight, file in index["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DdilError(f"the index {path} is damaged; fetch or make the model again") from error
    return json.dumps(index, indent=2)


def _convert_file(source: Path, out: Path, part: str | None = None) -> Converted:
    tensors, dropped = read_pickle(source, part)
    write_tensors(out, own_memory(tensors), {"format": "pt"})
    return Converted(str(source), _sha256(source), str(out), _sha256(out), len(tensors), dropped)


def _named(done: Converted, source: Path, out: Path) -> Converted:
    return Converted(str(source), done.source_sha256, str(out), done.out_sha256, done.tensors, done.dropped)


def read_pickle(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a pickled checkpoint by name, and the names of what else it holds; no code of the file is run.

    ``part`` is as in :func:`convert`.

    Raises:
        WrongCommand: it holds several sets of weights and ``part`` names none of them.
        DdilError: the pickle asks for a Python object other than tensors and plain containers, holds no tensors by name, or
            is damaged.
    """
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked is None:
            raise DdilError(f"{path} is damaged, or no checkpoint of PyTorch; get it again") from error
        raise DdilError(
            f"{path} asks for the Python object {asked[1]}, which could run code, and weights need none; nothing was run or "
            "written: get a copy in safetensors, or one that its author saved as weights alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise DdilError(
            f"{path} is cut short or damaged ({' '.join(str(error).split())[:120]}); get it again"
        ) from error
    return _tensors(content, path, part)


def _tensors(content: Any, path: Path, part: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of the part that is asked for, or of the only one that can be meant, and the names of the rest."""
    found = _parts(content)
    if not found:
        raise DdilError(f"{path} holds no tensors by name, so there are no weights to convert")
    place = next((place for place in found if _called(place) == part), None) if part is not None else _meant(content)
    if place is None:
        counts = ", ".join(f"{_called(place)} ({len(_at(tensors))})" for place, tensors in found.items())
        what = f"has no part {part!r}" if part is not None else "does not say which of its weights are meant"
        raise WrongCommand(
            f"{path} {what}; choose a part, as in --part {_called(next(iter(found)))}, of those that it has (with their number of "
            f"tensors): {counts}"
        )
    left, inner = [], content
    for name in place:
        left += [str(other) for other in inner if other != name]
        inner = inner[name]
    tensors = _at(inner)
    return tensors, (*left, *(str(name) for name in inner if str(name) not in tensors))


def _meant(content: Any) -> tuple[str, ...] | None:
    """The place of the weights where no part is asked for; None where there are several sets, or under names that are not known."""
    place: tuple[str, ...] = ()
    while True:
        tensors = _at(content)
        inner = [name for name in _NESTED if _parts(content.get(name))]
        if not inner:
            return place if tensors else None
        # Beside nested weights one number is a note, such as a step, and bytes are the state of a generator.
        if len(inner) > 1 or any(tensor.numel() > 1 and tensor.is_floating_point() for tensor in tensors.values()):
            return None
        place, content = (*place, inner[0]), content[inner[0]]


def _parts(content: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Mapping[Any, Any]]:
    """Every dictionary of a checkpoint that holds tensors by name, by its place; an optimizer's, by number, are none."""
    if not isinstance(content, Mapping):
        return {}
    found = {place: content} if _at(content) else {}
    for name, value in content.items():
        if isinstance(name, str):
            found |= _parts(value, (*place, name))
    return found


def _at(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors that lie in a dictionary itself."""
    import torch

    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _called(place: tuple[str, ...]) -> str:
    return ".".join(place) or TOP


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each contiguous and in memory of its own, as safetensors takes them: what is shared is written twice."""
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
