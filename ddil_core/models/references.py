"""Models by reference: turn a user's text into the local files of a model, or say what is missing.

A reference is one of these:

- ``shapes`` or ``shapes-flow``, the shipped teachers, or ``gaussians``, the exact one,
- the name of a system in ``protocols/systems.yaml``,
- a folder in diffusers' pipeline layout, or a run folder of ``ddil distill``,
- a single-file checkpoint, or FOLDER:FILE, a checkpoint with the configuration of a pipeline folder,
- a hub id, ``org/name`` or ``org/name@revision``,
- NAME:PATH, a user's own files as the system NAME. PATH is a pipeline folder or a single-file checkpoint. For a system
  that replaces its base's U-Net or adds a LoRA, PATH is that U-Net or LoRA.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ddil_core.models.hub import INDEX, HubPart, Repository, size_text
from ddil_core.models.single_file import require_safetensors, resolve_single_file
from ddil_core.models.system_specs import Files, SystemSpec, load_systems
from ddil_core.models.weights import AGAIN, PICKLES, PipelineFiles, pipeline_files, read_header
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import shown, user_path

_CORE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Shipped:
    """A model that comes with the package: its folder, what it is, and the module that makes it again."""

    folder: Path
    description: str
    module: str


SHIPPED = {
    "shapes": Shipped(
        _CORE / "shapes" / "weights" / "teacher",
        "the shipped teacher of the shapes world: 64 px, v-prediction, guided",
        "ddil_core.shapes.training",
    ),
    "shapes-flow": Shipped(
        _CORE / "shapes" / "weights" / "flow" / "teacher",
        "the shipped flow teacher of the shapes world: 64 px, a transformer in SD3's layout, guided",
        "ddil_core.shapes.training.flow",
    ),
    "gaussians": Shipped(
        _CORE / "gaussians" / "world",
        "the exact teacher of the gaussians world: points of a mixture",
        "ddil_core.gaussians",
    ),
}
"""The models that come with the package."""

_ACCEPTED = (
    "a name that 'ddil models' lists, a folder in diffusers' pipeline layout, a run folder of 'ddil distill', a "
    "single-file checkpoint (.safetensors), or a hub id, as in org/name or org/name@revision"
)


def resolve(reference: str) -> Files:
    """Return the local files of a reference. Fetch nothing.

    Raises:
        WrongCommand: the reference fits nothing, or its files are not here. The message says what to do.
    """
    if reference in SHIPPED:
        return Files(_require_pipeline(SHIPPED[reference].folder, reference))
    head, colon, tail = reference.partition(":")
    if head in load_systems():
        return _system(head, _path(tail) if colon else None)
    path = _path(reference)
    if path.is_dir():
        return Files(_require_pipeline(path / "student" if (path / "run.yaml").is_file() else path, reference))
    if path.is_file():
        return resolve_single_file(path, None, reference)
    if colon and _path(head).is_dir():
        return resolve_single_file(_path(tail), _require_pipeline(_path(head), head), reference)
    repository = Repository.parse(reference)
    if repository is None:
        raise _unknown(reference)
    folder = HubPart(repository).path()
    if folder is None:
        raise _not_here(reference, [HubPart(repository)])
    return Files(folder, system=next((row for row in load_systems().values() if row.source == repository.name), None))


def hub_parts(reference: str) -> list[HubPart]:
    """Return what a reference needs from the hub. The list is empty if the reference names local files."""
    name, colon, path = reference.partition(":")
    systems = load_systems()
    if name not in systems:
        repository = None if reference in SHIPPED or _path(reference).exists() else Repository.parse(reference)
        return [] if repository is None else [HubPart(repository)]
    row = systems[name]
    files = [file for file in (row.unet, row.lora) if file is not None]
    own = [HubPart(Repository(file.source, file.revision), file.file) for file in files]
    if colon and not own and _path(path).is_dir():
        return []
    pipeline = _pipeline_row(name)
    base = []
    if pipeline.source is not None:
        base = [HubPart(Repository(pipeline.source, pipeline.revision), patterns=pipeline.files)]
    return base + ([] if colon else own)


def is_here(reference: str, variant: str | None = None) -> bool:
    """Return whether all files of a reference are here and whole."""
    try:
        check_files(resolve(reference), reference, variant)
    except DdilError:
        return False
    return True


def check_files(files: Files, reference: str, variant: str | None = None) -> PipelineFiles:
    """Check that every file of weights is here and whole by its header, and return the weights of the pipeline.

    Raises:
        DdilError: a file is missing or damaged. The message names the file and says how to get it again.
    """
    with cure(reference):
        weights = PipelineFiles(files.folder, None, {})
        if files.checkpoint is None:
            weights = pipeline_files(files.folder, reference, variant)
        for path in (files.unet, files.lora, files.checkpoint):
            if path is not None:
                read_header(path)
    return weights


@contextmanager
def cure(reference: str) -> Iterator[None]:
    """Name the command that fetches a model of the hub again, in messages about its files inside the context."""
    try:
        yield
    except DdilError as error:
        local = ":" in reference or not hub_parts(reference)
        again = AGAIN if local else f"get it again with: ddil models download {reference}"
        raise type(error)(str(error).replace(AGAIN, again)) from error


def weights_sha256(files: Files, reference: str, variant: str | None = None) -> str:
    """Return a SHA-256 over all files of weights: the pipeline's in the order of their names, then the rest.

    Raises:
        DdilError: a file is missing or damaged.
    """
    components = dict(check_files(files, reference, variant).components)
    if files.unet is not None:
        components.pop("unet")  # the system's own U-Net replaces it
    by_name = {str(path.relative_to(files.folder)): path for paths in components.values() for path in paths}
    own = (files.unet, files.lora, files.checkpoint)
    digest = hashlib.sha256()
    for name, path in [*sorted(by_name.items()), *((path.name, path) for path in own if path is not None)]:
        digest.update(name.encode())
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def has_own_weights(reference: str) -> bool:
    """Return whether a reference is NAME:FILE and the file holds all weights of a pipeline."""
    name, colon, path = reference.partition(":")
    row = load_systems().get(name)
    return bool(row and colon and not row.unet and not row.lora and _path(path).is_file())


def _pipeline_row(name: str) -> SystemSpec:
    """Return the row with the pipeline of a system: the system's own row, or the row of its base."""
    row = load_systems()[name]
    return row if row.base is None else _pipeline_row(row.base)


def _system(name: str, path: Path | None) -> Files:
    row = load_systems()[name]
    reference = name if path is None else f"{name}:{path}"
    parts = hub_parts(reference)
    if path is not None and path.is_dir():
        return Files(_require_pipeline(path, reference), system=row)
    if path is not None and not path.is_file():
        raise WrongCommand(f"the model {reference!r} names {path}, and there is no such file or folder")
    if not parts:
        raise WrongCommand(
            f"the model {name!r} has no public weights as far as known; name a folder in diffusers' pipeline layout, "
            f"as in {name}:FOLDER"
        )
    here = [place for part in parts if (place := part.path()) is not None]
    if len(here) < len(parts):
        raise _not_here(reference, parts)
    folder, *own = here
    if path is not None and (row.unet or row.lora):
        own = [require_safetensors(path)]
    elif path is not None:
        return resolve_single_file(path, folder, reference, row)
    files = iter(own)
    return Files(folder, next(files) if row.unet else None, next(files) if row.lora else None, row)


def _path(text: str) -> Path:
    return user_path(text, "the model")


def _unknown(reference: str) -> WrongCommand:
    nearest = difflib.get_close_matches(reference, [*SHIPPED, *load_systems()], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return WrongCommand(f"the model {shown(reference)} is not known: it may be {_ACCEPTED}{hint}")


def _not_here(reference: str, parts: list[HubPart]) -> WrongCommand:
    lacking = [part for part in parts if part.path() is None]
    pickles = [part for part in lacking if part.file and part.file.endswith(PICKLES)]
    if pickles:
        return WrongCommand(advise_conversion(reference, pickles[0]))
    names = " and ".join(f"{part.file} of {part.repository}" if part.file else f"{part.repository}" for part in lacking)
    interrupted = sum(part.repository.interrupted_bytes() for part in lacking)
    here = f"here in part ({size_text(interrupted)} of an interrupted download)" if interrupted else "not here"
    system = reference.partition(":")[0] in load_systems()
    state = (
        f"is {here}: it needs {names} of the hub" if system else f"is no folder, and as a model of the hub it is {here}"
    )
    return WrongCommand(
        f"the model {reference!r} {state}; get it with: ddil models download {reference}, or add --download (in "
        "Python: download=True)"
    )


def advise_conversion(reference: str, part: HubPart) -> str:
    """Return the message for a model that is published only as a pickle."""
    name, file = reference.partition(":")[0], part.file or ""
    out = f"{Path(file).stem}.safetensors"
    return (
        f"the model {name!r} is published as a pickle, {file} of {part.repository}, which is never fetched because it "
        f"can run code; get it by hand, turn it into safetensors with: ddil models convert {file} {out}, and name the "
        f"model {name}:{out}"
    )


def _require_pipeline(folder: Path, reference: str) -> Path:
    if (folder / INDEX).is_file():
        return folder
    if reference in SHIPPED:
        problem = f"is not in this checkout; make it with: python -m {SHIPPED[reference].module}"
    elif folder.name == "student" and (folder.parent / "run.yaml").is_file():
        problem = "is a run that has no student yet; finish it with 'ddil distill … --resume'"
    else:
        problem = f"is a folder but no pipeline, as it has no {INDEX}; name one in diffusers' pipeline layout"
    raise WrongCommand(f"the model {reference!r} {problem}")
