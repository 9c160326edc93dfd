"""Hub repositories: the files in the local cache, the plan of a download, and the download.

Only :func:`download_files` fetches weights. It keeps the bytes of an interrupted download and compares each file of
weights with the hub's SHA-256. ``huggingface_hub`` does the rest (small files, links, layout of the cache).
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.system_specs import PIPELINE_FILES
from ddil_core.models.weights import PICKLES, components, has_weights, read_json, sets_of_weights
from ddil_core.support.checksums import sha256
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.lock import waiting_for

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``bar(title, total)`` is a context manager that yields ``advance(n)``. Both numbers are bytes."""

FETCHED = (".safetensors", ".json", ".txt")
"""Endings of the only files that are fetched: no pickles and no code."""

INDEX = "model_index.json"
MAX_LENGTH = 96
"""Most characters of a repository's name (the hub's own limit) and of a revision (our limit)."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A hub repository at a revision: a commit, a branch or a tag. None is the main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @classmethod
    def parse(cls, reference: str) -> Repository | None:
        """Parse ``org/name`` or ``org/name@revision``. Return None if the text is no such id."""
        name, at, revision = reference.partition("@")
        fits = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not re.search(r"--|\.\.|^[.-]|/[.-]|[.-]$", name)
        if not fits or len(name) > MAX_LENGTH or bool(at) != bool(revision):
            return None
        # The revision becomes part of a path in the cache. The path must stay inside the cache.
        if at and (len(revision) > MAX_LENGTH or not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", revision, re.ASCII)):
            return None
        return cls(name, revision or None)

    @property
    def storage(self) -> Path:
        """The repository's folder in the local cache. It holds ``blobs``, ``refs`` and ``snapshots``."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    def snapshot(self) -> Path | None:
        """Return the revision's folder in the cache, which may lack files. None: nothing was fetched."""
        ref = self.storage / "refs" / (self.revision or "main")
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else (self.revision or "")
        folder = self.storage / "snapshots" / commit
        return folder if commit and folder.is_dir() else None

    def interrupted_bytes(self) -> int:
        """Return the number of bytes that interrupted downloads left."""
        return sum(path.stat().st_size for path in self.storage.glob("blobs/*.incomplete"))


@dataclass(frozen=True)
class HubPart:
    """What a model needs from one repository: one file, or the files of a whole pipeline that fit the patterns.

    Attributes:
        repository: The repository.
        file: The path of the one file. None: a whole pipeline.
        patterns: The files of the pipeline.
    """

    repository: Repository
    file: str | None = None
    patterns: tuple[str, ...] = PIPELINE_FILES

    def path(self) -> Path | None:
        """Return the file, or the pipeline's folder, in the local cache. None: it is not here."""
        folder = self.repository.snapshot()
        path = folder / (self.file or INDEX) if folder else None
        if path is None or not path.is_file():
            return None
        return path if self.file else folder

    def plan(self, variant: str | None, weights: bool = True) -> DownloadPlan:
        """Plan the download of this part. See :func:`plan_download`."""
        return plan_download(self.repository, self.file or self.patterns, variant, weights)


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would fetch.

    Attributes:
        repository: The repository.
        commit: The commit that the revision names now.
        files: All files that the model needs.
        missing: The files that are not in the cache, or not in full length.
    """

    repository: Repository
    commit: str
    files: tuple[RepoFile, ...]
    missing: tuple[RepoFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the missing files."""
        return sum(file.size for file in self.missing)

    def __str__(self) -> str:
        total = size_text(sum(file.size for file in self.files))
        state = f"{len(self.files)} files, {total}, are here"
        if self.missing:
            state = f"{len(self.missing)} of {len(self.files)} files to fetch, {size_text(self.nbytes)} of {total}"
        return f"{self.repository} at {self.commit[:12]}: {state}"


def size_text(nbytes: float) -> str:
    """Write a number of bytes with three digits and a unit: 998 B, 12.3 MiB, 4.27 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while nbytes >= 1000 and power < len(units) - 1:
        nbytes, power = nbytes / 1024, power + 1
    digits = 0 if power == 0 or nbytes >= 100 else 1 if nbytes >= 10 else 2
    return f"{nbytes:.{digits}f} {units[power]}"


def pipeline_files_on_hub(
    names: Sequence[str], index: dict[str, Any], repository: object, variant: str | None = None, weights: bool = True
) -> list[str]:
    """List the files that a pipeline needs: for each component its configuration and one set of weights.

    Args:
        names: All files of the repository.
        index: The content of the repository's ``model_index.json``. It names the components.
        repository: The repository, for messages.
        variant: The preferred set of weights. A component without this variant takes its plain weights, or else its
            only variant.
        weights: False to list only the configuration.

    Raises:
        WrongCommand: no component has the variant.
        DdilError: a component has no weights in safetensors.
    """
    needed, variant_exists = [INDEX], False
    for component, (_, class_name) in components(index).items():
        inside = [name.split("/")[1] for name in names if name.startswith(f"{component}/") and name.count("/") == 1]
        chosen = [name for name in inside if name.endswith((".json", ".txt")) and ".index." not in name]
        if weights and has_weights(class_name):
            sets = sets_of_weights(inside)
            variant_exists = variant_exists or variant in sets
            if variant not in sets and None not in sets and len(sets) != 1:
                raise DdilError(_no_weights(component, inside, sets, repository))
            chosen += sets.get(variant) or sets.get(None) or next(iter(sets.values()))
        needed += [f"{component}/{name}" for name in chosen]
    if weights and variant is not None and not variant_exists:
        raise WrongCommand(f"the hub model {repository} has no weights of the variant {variant!r}")
    return needed


def _no_weights(component: str, names: Sequence[str], sets: dict[str | None, list[str]], repository: object) -> str:
    if sets:
        variants = ", ".join(map(str, sets))
        return f"the component {component} of the hub model {repository} comes as {variants}; choose with --variant"
    pickle = next((name for name in names if name.endswith(PICKLES)), None)
    if pickle is None:
        return f"the hub model {repository} has no weights for its component {component}"
    return (
        f"the hub model {repository} has the weights of its component {component} only as a pickle ({pickle}), which "
        "is not fetched because it can run code; get a copy by hand and turn it into safetensors with: "
        "ddil models convert FOLDER OUT"
    )


def plan_download(
    repository: Repository, files: str | Sequence[str], variant: str | None = None, weights: bool = True
) -> DownloadPlan:
    """Ask the hub which files a model needs, and compare them with the files in the cache.

    Args:
        repository: The repository.
        files: The path of one file, or patterns. With patterns, the model is a whole pipeline, and the plan holds the
            files of the pipeline that fit a pattern.
        variant: See :func:`pipeline_files_on_hub`.
        weights: See :func:`pipeline_files_on_hub`.

    Raises:
        WrongCommand: there is no such repository or revision, or the repository is no pipeline.
        DdilError: the hub cannot be reached, or has no safetensors.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    with _one_sentence(repository):
        api = HfApi()
        commit = repository.revision or ""
        if not _COMMIT.fullmatch(commit):
            commit = str(api.model_info(repository.name, revision=repository.revision).sha)
        tree = api.list_repo_tree(repository.name, recursive=True, revision=commit)
        listed = {file.path: file for file in tree if isinstance(file, RepoFile)}
        if isinstance(files, str):
            needed = [files]
        else:
            if INDEX not in listed:
                raise WrongCommand(
                    f"the hub model {repository} is no pipeline in diffusers' layout, as it has no {INDEX}"
                )
            index = read_json(Path(hf_hub_download(repository.name, INDEX, revision=commit)))
            names = pipeline_files_on_hub(list(listed), index, repository, variant, weights)
            needed = [name for name in names if any(fnmatchcase(name, pattern) for pattern in files)]
    for name in needed:
        if name not in listed:
            raise DdilError(f"the hub model {repository} has no file {name}")
        if not name.endswith(FETCHED):
            endings = ", ".join(FETCHED)
            raise DdilError(f"the file {name} of the hub model {repository} is not fetched: only {endings} files are")
    chosen = tuple(listed[name] for name in needed)
    snapshot = repository.storage / "snapshots" / commit
    missing = tuple(file for file in chosen if not _is_whole(snapshot / file.path, file))
    return DownloadPlan(repository, commit, chosen, missing)


def _is_whole(path: Path, file: RepoFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def download_files(plan: DownloadPlan, bar: ProgressBar) -> None:
    """Fetch the missing files of a plan into the hub's cache.

    Raises:
        DdilError: the disk is too small, the hub fails, or a file has another SHA-256 than the hub says.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    repository, storage = plan.repository, plan.repository.storage
    _require_disk(plan)
    weights = [file for file in plan.missing if file.lfs is not None]
    with bar("fetch", sum(file.size for file in weights)) as advance, _one_sentence(repository), waiting_for(storage):
        for file in plan.missing:
            pointer = storage / "snapshots" / plan.commit / file.path
            if not _is_whole(pointer, file):  # the library keeps a damaged file
                pointer.resolve().unlink(missing_ok=True)
                pointer.unlink(missing_ok=True)
        for file in weights:
            _fetch_weights(plan, file, advance)
        # The library fetches the small files and links all files into the snapshot.
        snapshot_download(  # type: ignore[call-overload]  # the class of the bar may be any callable
            repository.name,
            revision=repository.revision or "main",
            allow_patterns=[glob.escape(file.path) for file in plan.files],
            tqdm_class=partial(tqdm, disable=True),
        )


def _require_disk(plan: DownloadPlan) -> None:
    storage = plan.repository.storage
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(storage, error.strerror) from error
    if not os.access(storage, os.W_OK):
        raise _not_writable(storage, os.strerror(errno.EACCES))
    if (free := shutil.disk_usage(storage).free) < plan.nbytes:
        raise DdilError(f"{plan}, and {storage} has {size_text(free)} free; make room, or set HF_HOME to a larger disk")


def _fetch_weights(plan: DownloadPlan, file: RepoFile, advance: Callable[[int], None]) -> None:
    """Fetch one file of weights into the cache's blobs, starting after the bytes of an interrupted download.

    ``huggingface_hub`` 2.4 deletes the bytes of an interrupted file and compares no SHA-256, so this function does
    both.
    """
    from huggingface_hub import HfFileSystem, constants

    assert file.lfs is not None
    repository, expected = plan.repository, file.lfs.sha256
    blob = repository.storage / "blobs" / expected
    unfinished = blob.with_name(f"{expected}.incomplete")
    if _is_whole(blob, file):  # another process fetched the file while this one waited
        return advance(file.size)
    blob.parent.mkdir(exist_ok=True)
    if unfinished.is_file() and unfinished.stat().st_size > file.size:
        unfinished.unlink()
    source = f"{repository.name}/{file.path}"
    hub = HfFileSystem(endpoint=constants.ENDPOINT)
    with unfinished.open("ab") as out, hub.open(source, "rb", revision=plan.commit, block_size=0) as stream:
        stream.loc = out.tell()  # the stream's first request asks for the bytes from here on
        advance(stream.loc)
        while out.tell() < file.size:
            piece = stream.read(constants.DOWNLOAD_CHUNK_SIZE)
            if not piece:
                raise OSError(f"{file.path} ended after {out.tell()} of {file.size} bytes")
            out.write(piece)
            advance(len(piece))
    received = sha256(unfinished)
    if received != expected:
        unfinished.unlink()
        raise DdilError(
            f"the file {file.path} of the hub model {repository} came with the SHA-256 {received[:12]}…, and the hub "
            f"says {expected[:12]}…; the copy was deleted, so run the command again"
        )
    unfinished.replace(blob)


def require_blob(path: Path, what: str) -> None:
    """Refuse a file of the hub's cache that was damaged after the download. Other files pass.

    The cache keeps a file of weights under its SHA-256 (``blobs/SHA-256``), and links to it.

    Raises:
        DdilError: the content has another SHA-256. ``what`` names the model in the message.
    """
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and sha256(blob) != blob.name:
        raise DdilError(
            f"the file {path} of {what} was damaged after its download; delete {blob}, and download the model again"
        )


def _not_writable(path: object, reason: str | None) -> DdilError:
    return DdilError(
        f"files of the hub cannot be written to {path} ({reason}); make room and make the folder writable, or set "
        "HF_HOME to another folder"
    )


@contextmanager
def _one_sentence(repository: Repository) -> Iterator[None]:
    """Turn the errors of ``huggingface_hub`` and its HTTP client into messages of one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except DdilError:
        raise
    except OfflineModeIsEnabled as error:
        raise DdilError("HF_HUB_OFFLINE is set, so nothing is fetched; unset HF_HUB_OFFLINE to download") from error
    except GatedRepoError as error:
        raise DdilError(
            f"the hub gives {repository} only to users who accepted its terms: accept the terms on the model's page, "
            "then sign in with 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise WrongCommand(f"the hub at {constants.ENDPOINT} has no public model {repository.name}") from error
    except RevisionNotFoundError as error:
        raise WrongCommand(f"the hub model {repository.name} has no revision {repository.revision!r}") from error
    except Exception as error:  # each version of the client raises other errors of its HTTP library
        if isinstance(error, OSError) and error.filename is not None:  # an error of the disk
            raise _not_writable(error.filename, error.strerror) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DdilError(
            f"{repository} could not be fetched from {constants.ENDPOINT}: {reason}; the fetched bytes are kept, so "
            "run the command again"
        ) from error
