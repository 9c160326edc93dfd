"""Files of hub repositories: what is cached here, what is missing and how large it is, and fetching it when asked to.

Nothing is fetched but through :func:`download`. Weights come to the name under which the hub's cache keeps them, bit by bit
into ``NAME.incomplete``, so that an interrupted download goes on where it stopped; they are checked against the hub's SHA-256
before they get their name. All else (links, small files, the cache's layout) is ``huggingface_hub``'s work.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.weights import PICKLES, components, has_weights, read_json, sets_of_weights
from ddil_core.support.errors import DdilError, WrongCommand

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

FETCHED = (".safetensors", ".json", ".txt")
"""The only kinds of file that are fetched: no pickle and no code."""

INDEX = "model_index.json"
LONGEST = 96
"""Characters of a repository's name, by the hub's own rule, and of a revision's here."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A hub repository at a revision (a commit, branch or tag; None: its main branch)."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @classmethod
    def parse(cls, reference: str) -> Repository | None:
        """``org/name`` or ``org/name@revision``; None for what is no such id."""
        name, at, revision = reference.partition("@")
        fits = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not re.search(r"--|\.\.|^[.-]|/[.-]|[.-]$", name)
        if not fits or len(name) > LONGEST or bool(at) != bool(revision):
            return None
        # a revision is part of a path in the cache, which it must not lead out of
        if at and (len(revision) > LONGEST or not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", revision, re.ASCII)):
            return None
        return cls(name, revision or None)

    @property
    def storage(self) -> Path:
        """Where the cache keeps it: ``blobs``, ``refs`` and ``snapshots``."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    def snapshot(self) -> Path | None:
        """The folder of its files in the cache, which may lack some; None where it was never fetched."""
        ref = self.storage / "refs" / (self.revision or "main")
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else (self.revision or "")
        folder = self.storage / "snapshots" / commit
        return folder if commit and folder.is_dir() else None

    def half_fetched(self) -> int:
        """Bytes of files whose download was interrupted."""
        return sum(path.stat().st_size for path in self.storage.glob("blobs/*.incomplete"))


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would bring: ``files`` are all that are needed, ``missing`` those that are not here whole."""

    repository: Repository
    commit: str
    files: tuple[RepoFile, ...]
    missing: tuple[RepoFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.missing)

    def __str__(self) -> str:
        total = size_text(sum(file.size for file in self.files))
        here = f"{len(self.files)} files, {total}, are here"
        need = f"{len(self.missing)} of {len(self.files)} files to fetch, {size_text(self.nbytes)} of {total}"
        return f"{self.repository} at {self.commit[:12]}: {need if self.missing else here}"


def size_text(nbytes: float) -> str:
    """Bytes in words, with three digits: 998 B, 12.3 MiB, 4.27 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while nbytes >= 1000 and power < len(units) - 1:
        nbytes, power = nbytes / 1024, power + 1
    digits = 0 if power == 0 or nbytes >= 100 else 1 if nbytes >= 10 else 2
    return f"{nbytes:.{digits}f} {units[power]}"


def needed(
    names: Sequence[str], index: dict[str, Any], repository: object, variant: str | None = None, weights: bool = True
) -> list[str]:
    """The files of a repository that a pipeline needs, by the components of its ``model_index.json``.

    Of each component the configuration and one set of weights: of the variant where there is one, else the plain one, else
    the only variant that there is. Without ``weights`` the configuration alone.

    Raises:
        WrongCommand: no component has the variant.
        DdilError: a component has no weights in safetensors.
    """
    wanted, found = [INDEX], False
    for component, (_, kind) in components(index).items():
        inside = [name.split("/")[1] for name in names if name.startswith(f"{component}/") and name.count("/") == 1]
        texts = [name for name in inside if name.endswith((".json", ".txt")) and ".index." not in name]
        if weights and has_weights(kind):
            sets = sets_of_weights(inside)
            found = found or variant in sets
            if variant not in sets and None not in sets and len(sets) != 1:
                raise DdilError(_no_weights(component, inside, sets, repository))
            texts += sets.get(variant) or sets.get(None) or next(iter(sets.values()))
        wanted += [f"{component}/{name}" for name in texts]
    if weights and variant is not None and not found:
        raise WrongCommand(f"the hub model {repository} has no weights of the variant {variant!r}")
    return wanted


def _no_weights(component: str, names: Sequence[str], sets: dict[str | None, list[str]], repository: object) -> str:
    if sets:
        kinds = ", ".join(map(str, sets))
        return f"the component {component} of the hub model {repository} comes as {kinds}; choose with --variant"
    pickle = next((name for name in names if name.endswith(PICKLES)), None)
    if pickle is None:
        return f"the hub model {repository} has no weights for its component {component}"
    return (
        f"the hub model {repository} has the weights of its component {component} as a pickle alone ({pickle}), which is not "
        "fetched, as it can run code; get a copy by hand and turn it into safetensors with: ddil models convert FOLDER OUT"
    )


def plan_download(
    repository: Repository, files: str | Sequence[str], variant: str | None = None, weights: bool = True
) -> DownloadPlan:
    """Ask the hub for one file, or for what a pipeline needs and fits the patterns ``files``; compare with what is here.

    ``variant`` and ``weights`` are as in :func:`needed`.

    Raises:
        WrongCommand: no such repository or revision, or it is no pipeline.
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
            wanted = [files]
        else:
            if INDEX not in listed:
                raise WrongCommand(
                    f"the hub model {repository} is no pipeline in diffusers' layout, as it has no {INDEX}"
                )
            index = read_json(Path(hf_hub_download(repository.name, INDEX, revision=commit)))
            names = needed(list(listed), index, repository, variant, weights)
            wanted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in files)]
    for name in wanted:
        if name not in listed:
            raise DdilError(f"the hub model {repository} has no file {name}")
        if not name.endswith(FETCHED):
            raise DdilError(
                f"the file {name} of the hub model {repository} is not fetched: only {', '.join(FETCHED)} are"
            )
    chosen = tuple(listed[name] for name in wanted)
    snapshot = repository.storage / "snapshots" / commit
    missing = tuple(file for file in chosen if not _whole(snapshot / file.path, file))
    return DownloadPlan(repository, commit, chosen, missing)


def _whole(path: Path, file: RepoFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def download_files(plan: DownloadPlan, bar: Callable[..., Any]) -> Path:
    """Fetch what a plan misses; returns the snapshot's folder.

    ``bar(title, total)`` is a context manager that yields ``advance(n)``, in bytes.

    Raises:
        DdilError: the disk is too small, the hub fails, or a file is not what the hub says it is.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    repository, storage = plan.repository, plan.repository.storage
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_kept(storage, error) from error
    if (free := shutil.disk_usage(storage).free) < plan.nbytes:
        raise DdilError(f"{plan}, and {storage} has {size_text(free)} free; make room, or set HF_HOME to a larger disk")
    for file in plan.missing:  # one that is here in another length is damaged, and the library would keep it
        pointer = storage / "snapshots" / plan.commit / file.path
        pointer.resolve().unlink(missing_ok=True)
        pointer.unlink(missing_ok=True)
    heavy = sum(file.size for file in plan.missing if file.lfs is not None)
    with bar("fetch", heavy) as advance, _one_sentence(repository):
        for file in plan.missing:
            if file.lfs is not None:
                _fetch(file, plan, advance)
        disable_progress_bars()
        try:
            # From the library: links to the files that are here, the small files, and the cache's own notes.
            names = [re.sub(r"([\[?*])", r"[\1]", file.path) for file in plan.files]
            revision = repository.revision or "main"
            return Path(snapshot_download(repository.name, revision=revision, allow_patterns=names))
        finally:
            enable_progress_bars()


def _fetch(file: RepoFile, plan: DownloadPlan, advance: Callable[[int], None]) -> None:
    """One file of weights to its place among the cache's blobs, going on from ``.incomplete``."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    assert file.lfs is not None
    storage, sha256 = plan.repository.storage, file.lfs.sha256
    blob, partial = storage / "blobs" / sha256, storage / "blobs" / f"{sha256}.incomplete"
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / storage.name / f"{sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if partial.is_file() and partial.stat().st_size > file.size:
            partial.unlink()
        with partial.open("ab") as out:
            start = out.tell()
            if start == file.size:
                advance(start)
            http_get(
                hf_hub_url(plan.repository.name, file.path, revision=plan.commit),
                out,
                resume_size=start,
                headers=build_hf_headers(),
                expected_size=file.size,
                tqdm_class=lambda **settings: _Bar(advance, settings["initial"]),  # type: ignore[arg-type]
            )
        with partial.open("rb") as read:
            got = hashlib.file_digest(read, "sha256").hexdigest()
        if got != sha256:
            partial.unlink()
            raise DdilError(
                f"the file {file.path} of the hub model {plan.repository} came with the SHA-256 {got[:12]}…, and the hub says "
                f"{sha256[:12]}…; the copy was deleted, so run the command again"
            )
        partial.replace(blob)


class _Bar:
    """What ``huggingface_hub`` takes for a bar: bytes go to ``advance``, those that were here before at once."""

    def __init__(self, advance: Callable[[int], None], initial: int) -> None:
        self.update = advance
        advance(initial)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _not_kept(path: Path, error: OSError) -> DdilError:
    return DdilError(
        f"files of the hub cannot be kept in {path} ({error.strerror}); make room and make it writable, or set HF_HOME to another "
        "folder"
    )


@contextmanager
def _one_sentence(repository: Repository) -> Iterator[None]:
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
        raise DdilError("HF_HUB_OFFLINE is set, so nothing is fetched; unset it to download") from error
    except GatedRepoError as error:
        raise DdilError(
            f"the hub gives {repository} only to those who accepted its terms: do so on its page, then sign in with 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise WrongCommand(f"the hub at {constants.ENDPOINT} has no public model {repository.name}") from error
    except RevisionNotFoundError as error:
        raise WrongCommand(f"the hub model {repository.name} has no revision {repository.revision!r}") from error
    except Exception as error:  # the client's own kinds, and those of the HTTP library below it, which changes
        if isinstance(error, OSError) and error.filename is not None:  # of the disk
            raise _not_kept(Path(str(error.filename)), error) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DdilError(
            f"{repository} could not be fetched from {constants.ENDPOINT}: {reason}; what came is kept, so run the command again"
        ) from error
