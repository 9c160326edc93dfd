"""Files of weights that metrics need: their place, their check, and how they get there.

Nothing is downloaded without a command. ``ddil metrics --get NAME`` fetches a file from its source,
``ddil metrics --add NAME=FILE`` copies a local file. The stored files are safetensors. A source that publishes a pickle
is read with ``weights_only=True`` and converted. Inception is TorchScript, as its source publishes it.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, BinaryIO
from urllib.error import URLError
from urllib.request import urlopen

from ddil_core.models.weights import read_header
from ddil_core.support.checksums import require_checksum, with_checksum
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import replacing
from ddil_core.support.lock import waiting_for
from ddil_core.support.progress import transfer
from ddil_core.support.resources import require_cache, user_folder

if TYPE_CHECKING:
    from torch import Tensor

NOT_A_PICKLE = (UnpicklingError, RuntimeError, LookupError, TypeError, EOFError, AttributeError, ValueError)
"""What ``torch.load`` raises with ``weights_only=True`` for a file that is no pickle, or holds more than tensors."""


@dataclass(frozen=True)
class WeightsFile:
    """One file of weights in the user's folder.

    Attributes:
        file: The name of the file.
        url: Where the source publishes the file.
        sha256: The SHA-256 of the published file, or its first characters, as the source states it. None where the
            source states none; the file is then "unverified".
        convert: Takes the published file and a target, and writes the safetensors file that the metric reads. None
            where the metric reads the published file.
        place: Finds weights that an installed package brings; they are used instead of the user's folder.
        cure: How to get weights that a package brings.
        tensors: Names of tensors that a safetensors file must hold, so that another network's file is noticed.
    """

    file: str
    url: str | None = None
    sha256: str | None = None
    convert: Callable[[Path, Path], None] | None = None
    place: Callable[[], Path | None] | None = None
    cure: str = ""
    tensors: tuple[str, ...] = ()

    def path(self) -> Path:
        """Return the place of the file, whether or not the file exists."""
        in_package = self.place() if self.place is not None else None
        return in_package if in_package is not None else weights_folder() / self.file

    def missing(self) -> str | None:
        """Return None where the file is here, else how to get it, in one sentence."""
        if self.path().is_file():
            return None
        if self.cure:
            return self.cure
        source = f" from {self.url}" if self.url else ""
        return f"the weights {self.path()} are not here; get them{source} with: ddil metrics --get {self.file}"

    def digest(self) -> str:
        """Return the SHA-256 of the file. Raises DdilError where the file is missing."""
        problem = self.missing()
        if problem is not None:
            raise DdilError(problem)
        path = self.path()
        status = path.stat()
        return _sha256(path, status.st_size, status.st_mtime_ns)

    def checked(self) -> Path:
        """Return the file after comparing it with the published SHA-256, or else with its own checksum.

        Raises:
            DdilError: the file is missing, was damaged after it was stored, or is not the published file.
        """
        path = self.path()
        if self.convert is None and self.sha256 is not None:
            _compare(path, self.digest(), self.sha256)
        elif problem := self.missing():
            raise DdilError(problem)
        else:
            require_checksum(path, "the file of weights", "delete it and get it again")
        return path

    @property
    def check(self) -> str:
        """How the file is compared with what its source publishes, in words."""
        if self.sha256 is None:
            return "unverified"
        return "verified" if self.convert is None else "verified when fetched, not when added converted"

    def add(self, published: Path) -> Path:
        """Check and convert the published file, write it into the user's folder, and return its place there.

        Raises:
            WrongCommand: there is no such file.
            DdilError: the file is not the published file or of another kind, cannot be converted, or cannot be written.
        """
        self.require(published)
        as_read = self.convert is None or published.suffix == ".safetensors"
        if self.sha256 is not None and (self.convert is None or not as_read):
            _compare(published, _sha256(published, published.stat().st_size, published.stat().st_mtime_ns), self.sha256)
        target = weights_folder() / self.file
        if self.convert is None or as_read:
            self._examine(published, published)
        require_cache()
        with with_checksum(target) as temporary:
            if self.convert is None or as_read:
                shutil.copyfile(published, temporary)
            else:
                self.convert(published, temporary)
                self._examine(temporary, published)
        return target

    def require(self, published: Path) -> None:
        """Refuse a file to add that does not exist.

        Raises:
            WrongCommand: there is no such file.
        """
        if not published.is_file():
            raise WrongCommand(f"{published} is not here; name the file that holds the weights {self.file}")

    def _examine(self, path: Path, published: Path) -> None:
        """Look whether a file is of the kind that the metric reads. No weight is loaded and no code is run.

        Raises:
            DdilError: it is not. The message names the ``published`` file.
        """
        if self.file.endswith(".safetensors"):
            try:
                held = read_header(path)
            except DdilError as error:
                raise DdilError(f"{published} is no safetensors file, or is cut short; fetch it again") from error
            absent = [name for name in self.tensors if name not in held]
            if absent:
                raise DdilError(f"{published} holds other weights than {self.file}: it has no tensor {absent[0]!r}")
        elif self.sha256 is None and self.file.endswith(".pt") and not _is_torchscript(path):
            raise DdilError(f"{published} is no TorchScript file, as {self.file} is; fetch it again")

    def get(self) -> Path:
        """Fetch the file from its source, check it, and write it into the user's folder.

        Raises:
            DdilError: there is no public source, the source cannot be reached, or it sent another file.
        """
        if self.url is None:
            raise DdilError(self.cure or f"the weights {self.file} have no public source; add a local file with --add")
        target = weights_folder() / f"{self.file}.fetched"
        require_cache()
        with waiting_for(weights_folder()):
            return self._get(self.url, target)

    def _get(self, url: str, target: Path) -> Path:
        try:
            with urlopen(url) as source, replacing(target) as temporary:
                length = source.headers.get("Content-Length")
                with temporary.open("wb") as file:
                    self._download(source, file, int(length or 0))
                if length is not None and temporary.stat().st_size != int(length):
                    raise DdilError(f"{url} broke off after {temporary.stat().st_size} of {length} bytes; try again")
            return self.add(target)
        except (URLError, ConnectionError, TimeoutError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise DdilError(
                f"{url} cannot be reached ({reason}); fetch it on another machine and add it with: "
                f"ddil metrics --add {self.file}=FILE"
            ) from error
        finally:
            target.unlink(missing_ok=True)

    def _download(self, source: BinaryIO, file: BinaryIO, length: int) -> None:
        try:
            with transfer(f"fetch {self.file}", length) as advance:
                while piece := source.read(2**20):
                    file.write(piece)
                    advance(len(piece))
        except (ConnectionError, TimeoutError, HTTPException) as error:
            # Caught here, because ``replacing`` reports every OSError as a fault of the disk.
            raise DdilError(f"the connection to {self.url} broke off ({error}); try again") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of weights for a network.

    A ReLU turns −∞ into 0 and hides it, so the weights are checked here, and not the features alone.

    Raises:
        DdilError: a weight is NaN or infinite.
        SafetensorError: the file is damaged.
    """
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(path)
    broken = next((name for name, weight in state.items() if not weight.isfinite().all()), None)
    if broken is not None:
        raise DdilError(f"{path} holds weights that are not finite, first in {broken}; delete it and get it again")
    return state


def _is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript: its constants and its code lie in one folder of a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return all(any(part in name for name in names) for part in ("/constants.pkl", "/code/"))


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file. The cache keeps it until the size or the time of the file changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, digest: str, expected: str) -> None:
    if not digest.startswith(expected):
        raise DdilError(
            f"{path} is not the file that its source publishes (sha256 {digest[:12]}…, expected {expected[:12]}…); "
            "delete the file and get it again"
        )


def weights_folder() -> Path:
    """Return the folder of the weights of metrics."""
    return user_folder() / "weights"
