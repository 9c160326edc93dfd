"""Models by reference: from what a user writes to the files that it names, all of them local; and how to get those that are not.

A reference is ``shapes``; a name of ``protocols/systems.yaml``; a folder in diffusers' pipeline layout; a run folder of
``ddil distill``; a single-file checkpoint; or a hub id, with ``@revision`` where one is pinned. ``NAME:PATH`` takes a user's own
files as the system NAME: a pipeline, a single-file checkpoint, or, where the system is a base with a U-Net or a LoRA of its own,
that U-Net or LoRA.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.models.checkpoint import said_prediction
from ddil_core.models.hub import INDEX, DownloadPlan, Repository, download_files, plan_download, size_text
from ddil_core.models.systems import PIPELINE_FILES, Files, SystemSpec, load_systems
from ddil_core.models.weights import AGAIN, PICKLES, PipelineFiles, count, pipeline_files, read_header
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import shown, user_path

SHIPPED = {"shapes": Path(__file__).parents[1] / "shapes" / "weights" / "teacher"}
"""The models that come with the package."""

UNVERIFIED = "unverified"
"""What prints where something was not read at its source."""

_ACCEPTED = (
    "a name that 'ddil models' lists, a folder in diffusers' pipeline layout, a run folder of 'ddil distill', a single-file "
    "checkpoint (.safetensors), or a hub id, as in org/name or org/name@revision"
)
_SINGLE_FILES = {
    "conditioner.embedders.1.model.": "sdxl",
    "cond_stage_model.model.": "sd21",
    "cond_stage_model.transformer.": "sd15",
}
"""A text encoder's prefix in a single-file checkpoint, to the system whose configuration fits.

Few files say what they predict (``said_prediction``). Of Stable Diffusion 2's prefix there are models that predict v and models
that predict ε, so that users say which it is, where the file does not say that it predicts v.
"""

_IN_A_SINGLE_FILE = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.": "text_encoder",
}


@dataclass(frozen=True)
class Part:
    """What a reference needs of one hub repository: the given ``file``, or of a whole pipeline what fits ``patterns``."""

    repository: Repository
    file: str | None = None
    patterns: tuple[str, ...] = PIPELINE_FILES

    def here(self) -> Path | None:
        """The file, or the pipeline's folder, in the local cache."""
        folder = self.repository.snapshot()
        path = folder / (self.file or INDEX) if folder else None
        if path is None or not path.is_file():
            return None
        return path if self.file else folder

    def plan(self, variant: str | None, weights: bool = True) -> DownloadPlan:
        """See :func:`ddil_core.models.hub.plan`."""
        return plan_download(self.repository, self.file or self.patterns, variant, weights)


def resolve(reference: str) -> Files:
    """The local files that a reference names; nothing is fetched.

    Raises:
        WrongCommand: the reference fits nothing, or its files are not here; the message says what would do.
    """
    if reference in SHIPPED:
        return Files(_require_pipeline(SHIPPED[reference], reference))
    head, colon, tail = reference.partition(":")
    if head in load_systems():
        return _system(head, _path(tail) if colon else None)
    path = _path(reference)
    if path.is_dir():
        return Files(_require_pipeline(path / "student" if (path / "run.yaml").is_file() else path, reference))
    if path.is_file():
        return _single_file(path, None, reference)
    if colon and _path(head).is_dir():
        return _single_file(_path(tail), _require_pipeline(_path(head), head), reference)
    repository = Repository.parse(reference)
    if repository is None:
        raise _unknown(reference)
    folder = Part(repository).here()
    if folder is None:
        raise _not_here(reference, [Part(repository)])
    return Files(folder, system=next((row for row in load_systems().values() if row.source == repository.name), None))


def hub_parts(reference: str) -> list[Part]:
    """What a reference needs of the hub: nothing, where it names local files."""
    name, colon, path = reference.partition(":")
    systems = load_systems()
    if name not in systems:
        repository = None if reference in SHIPPED or _path(reference).exists() else Repository.parse(reference)
        return [] if repository is None else [Part(repository)]
    row = systems[name]
    own = [Part(Repository(one.source, one.revision), one.file) for one in (row.unet, row.lora) if one is not None]
    if colon and not own and _path(path).is_dir():
        return []
    pipeline = _pipeline_row(name)
    base = []
    if pipeline.source is not None:
        base = [Part(Repository(pipeline.source, pipeline.revision), patterns=pipeline.files)]
    return base + ([] if colon else own)


def fetch_model(
    reference: str,
    variant: str | None,
    say: Callable[[str], None],
    bar: Callable[..., Any],
    *,
    weights: bool = True,
) -> None:
    """Fetch what a reference needs of the hub and is not here. ``say`` is told the size before anything is fetched.

    ``bar`` is as in :func:`ddil_core.models.hub.download`. Without ``weights`` the configuration alone, which is all that
    NAME:FILE needs where FILE is a single-file checkpoint.

    Raises:
        WrongCommand: there is nothing on the hub to fetch for it.
        DdilError: see :func:`ddil_core.models.hub.plan` and :func:`ddil_core.models.hub.download`.
    """
    wanted = hub_parts(reference)
    if not wanted:
        resolve(reference)  # says what is wrong with a reference that names no files
        raise WrongCommand(f"the model {reference!r} is not on a hub, so there is nothing to fetch")
    weights = weights and not _has_own_weights(reference)
    pickled = [part for part in wanted if part.file and part.file.endswith(PICKLES)]
    plans = [(part, part.plan(variant, weights)) for part in wanted if part not in pickled]
    for _, one in plans:
        say(str(one))
    for part, one in plans:
        if one.missing or part.here() is None:  # it may be here under another revision's name
            download_files(one, bar)
    if pickled:
        raise DdilError(_by_hand(reference, pickled[0]))


def is_here(reference: str, variant: str | None = None) -> bool:
    """Whether all files of a reference are here and whole."""
    try:
        check_files(resolve(reference), reference, variant)
    except DdilError:
        return False
    return True


def check_files(files: Files, reference: str, variant: str | None = None) -> PipelineFiles:
    """The weights of a reference's pipeline, every file found and whole by its header, its own U-Net and LoRA included.

    Raises:
        DdilError: one is missing or damaged; the message names it and says how to get it again.
    """
    try:
        found = pipeline_files(files.folder, reference, variant, weights=files.checkpoint is None)
        for path in (files.unet, files.lora, files.checkpoint):
            if path is not None:
                read_header(path)
    except DdilError as error:
        own = ":" in reference or not hub_parts(reference)
        cure = AGAIN if own else f"get it again with: ddil models download {reference}"
        raise type(error)(str(error).replace(AGAIN, cure)) from error
    return found


def parameters(reference: str, variant: str | None = None) -> tuple[Path, dict[str, int]]:
    """The folder of a reference's configuration, and the number of parameters of each component, from headers alone."""
    files = resolve(reference)
    found = check_files(files, reference, variant)
    if files.checkpoint is None:
        return files.folder, {name: count(paths) for name, paths in found.components.items()}
    counts = dict.fromkeys(_IN_A_SINGLE_FILE.values(), 0)
    for name, entry in read_header(files.checkpoint).items():
        for prefix, component in _IN_A_SINGLE_FILE.items():
            counts[component] += entry.numel if name.startswith(prefix) else 0
    return files.folder, counts


def _has_own_weights(reference: str) -> bool:
    """Whether a reference is NAME:FILE with a file that holds a whole pipeline's weights."""
    name, colon, path = reference.partition(":")
    row = load_systems().get(name)
    return bool(row and colon and not row.unet and not row.lora and _path(path).is_file())


def _pipeline_row(name: str) -> SystemSpec:
    """The row whose pipeline a system takes: its own, or its base's."""
    row = load_systems()[name]
    return row if row.base is None else _pipeline_row(row.base)


def _system(name: str, path: Path | None) -> Files:
    row = load_systems()[name]
    reference = name if path is None else f"{name}:{path}"
    needs = hub_parts(reference)
    if path is not None and path.is_dir():
        return Files(_require_pipeline(path, reference), system=row)
    if path is not None and not path.is_file():
        raise WrongCommand(f"the model {reference!r} names {path}, and there is no such file or folder")
    if not needs:
        raise WrongCommand(
            f"the model {name!r} has no public weights as far as known; name a folder in diffusers' pipeline layout, "
            f"as in {name}:FOLDER"
        )
    found = [part.here() for part in needs]
    if None in found:
        raise _not_here(reference, needs)
    folder, *rest = (here for here in found if here is not None)
    if path is not None and (row.unet or row.lora):
        rest = [_safetensors(path)]
    elif path is not None:
        return _single_file(path, folder, reference, row)
    own = iter(rest)
    return Files(folder, next(own) if row.unet else None, next(own) if row.lora else None, row)


def _single_file(path: Path, config: Path | None, reference: str, row: SystemSpec | None = None) -> Files:
    """A checkpoint that holds all of a pipeline's weights, with a pipeline's folder for its configuration."""
    header = read_header(_safetensors(path))
    fits = next((name for prefix, name in _SINGLE_FILES.items() if any(key.startswith(prefix) for key in header)), None)
    if fits is None:
        raise WrongCommand(
            f"the file {path} holds no text encoder as Stable Diffusion's single files do, so it is no whole model; "
            "a U-Net or a LoRA goes onto a system, as in dmd2:FILE or lcm-lora:FILE"
        )
    said = said_prediction(path)
    if row is not None and said is not None and row.prediction in ("flow", "rectified_flow"):
        raise WrongCommand(
            f"the model {reference!r} is sampled as a flow, and the file {path} says that it predicts {said}; name another system"
        )
    if config is None and row is None and fits == "sd21" and said != "v_prediction":
        if said is not None:
            raise WrongCommand(
                f"the file {path} is one of Stable Diffusion 2 and says that it predicts {said}, and no system has such settings; "
                f"name a pipeline folder of that model, as in FOLDER:{path}"
            )
        raise WrongCommand(
            f"the file {path} is one of Stable Diffusion 2, and does not say whether it predicts v or ε; name the system whose "
            f"settings it has, as in sd21:{path} for v at 768 pixels, or a pipeline folder, as in FOLDER:{path}"
        )
    if config is None:
        row = row or load_systems()[fits]
        config = Part(Repository(str(row.source), row.revision)).here()
    if config is None:
        raise WrongCommand(
            f"the file {path} holds weights alone, and the configuration of {fits} that it needs is not here; get it with: "
            f"ddil models download {fits} --config-only, or name a pipeline of the same layout, as in FOLDER:{path}"
        )
    return Files(config, system=row, checkpoint=path, prediction=said)


def _safetensors(path: Path) -> Path:
    if path.suffix in PICKLES:
        out = path.with_suffix(".safetensors")
        raise WrongCommand(
            f"{path} is a pickle, which can run code; turn it into safetensors with: ddil models convert {path} {out}"
        )
    if path.suffix != ".safetensors":
        raise WrongCommand(f"{path} is no file of weights; name one that ends in .safetensors")
    return path


def _path(text: str) -> Path:
    return user_path(text, "the model")


def _unknown(reference: str) -> WrongCommand:
    nearest = difflib.get_close_matches(reference, [*SHIPPED, *load_systems()], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return WrongCommand(f"the model {shown(reference)} is not known: it may be {_ACCEPTED}{hint}")


def _not_here(reference: str, needs: list[Part]) -> WrongCommand:
    lacking = [part for part in needs if part.here() is None]
    pickled = [part for part in lacking if part.file and part.file.endswith(PICKLES)]
    if pickled:
        return WrongCommand(_by_hand(reference, pickled[0]))
    what = " and ".join(f"{part.file} of {part.repository}" if part.file else f"{part.repository}" for part in lacking)
    half = sum(part.repository.interrupted_bytes() for part in lacking)
    here = f"here in part ({size_text(half)} of an interrupted download)" if half else "not here"
    system = reference.partition(":")[0] in load_systems()
    state = (
        f"is {here}: it needs {what} of the hub" if system else f"is no folder, and as a model of the hub it is {here}"
    )
    return WrongCommand(
        f"the model {reference!r} {state}; get it with: ddil models download {reference}, or add --download"
    )


def _by_hand(reference: str, part: Part) -> str:
    name, file = reference.partition(":")[0], part.file or ""
    out = f"{Path(file).stem}.safetensors"
    return (
        f"the model {name!r} is published as a pickle, {file} of {part.repository}, which is never fetched, as it can run code; "
        f"get it by hand, turn it into safetensors with: ddil models convert {file} {out}, and name the model {name}:{out}"
    )


def _require_pipeline(folder: Path, reference: str) -> Path:
    if (folder / INDEX).is_file():
        return folder
    if reference in SHIPPED:
        what = "is not in this checkout; train it with: python -m ddil_core.shapes.training"
    elif folder.name == "student" and (folder.parent / "run.yaml").is_file():
        what = "is a run that has no student yet; finish it with 'ddil distill … --resume'"
    else:
        what = f"is a folder but no pipeline, as it has no {INDEX}; name one in diffusers' pipeline layout"
    raise WrongCommand(f"the model {reference!r} {what}")


def list_models() -> list[dict[str, Any]]:
    """The models that have a name, for ``ddil models``; ``bytes`` are those on this machine, interrupted downloads included."""
    rows = []
    for name, folder in SHIPPED.items():
        row = {
            "description": "the shipped teacher of the shapes world: 64 px, v-prediction, guided",
            "source": "shipped with the package",
            "revision": "shipped",
            "licence": "apache-2.0",
            "bytes": _bytes_in(folder),
        }
        rows.append({"name": name, **row, **_state(name)})
    for name, system in load_systems().items():
        row = {
            "description": system.title,
            "source": " + ".join(_source(part) for part in hub_parts(name)) or None,
            "revision": system.revision or UNVERIFIED,
            "licence": system.licence or UNVERIFIED,
            "bytes": sum(_bytes_of(part) for part in hub_parts(name)),
        }
        rows.append({"name": name, **row, **_state(name)})
    return rows


def _state(name: str) -> dict[str, Any]:
    """Whether a named model's files are all here and whole, and what to do where they are not."""
    try:
        check_files(resolve(name), name)
    except DdilError as error:
        return {"here": False, "needs": str(error).removeprefix(f"the model {name!r} ")}
    return {"here": True, "needs": ""}


def _source(part: Part) -> str:
    return f"{part.repository.name}/{part.file}" if part.file else part.repository.name


def _bytes_of(part: Part) -> int:
    folder = part.repository.snapshot()
    if folder is None:
        return part.repository.interrupted_bytes()
    if part.file is None:
        return _bytes_in(folder) + part.repository.interrupted_bytes()
    path = folder / part.file
    return (path.stat().st_size if path.is_file() else 0) + part.repository.interrupted_bytes()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
