"""Files of weights that metrics need: where they lie, whether they are the right ones, and how they get there.

Nothing here runs by itself: ``ddil metrics --get NAME`` fetches from the source, ``ddil metrics --add NAME=FILE`` takes a
file that is here already. Files are safetensors; one that its source publishes as a pickle is converted on that occasion,
with ``weights_only=True``. Inception is TorchScript, as its source publishes it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError
from urllib.request import urlopen

from ddil_core.support.errors import DdilError
from ddil_core.support.files import replacing
from ddil_core.support.lock import waiting_for
from ddil_core.support.resources import require_cache, user_folder


@dataclass(frozen=True)
class WeightsFile:
    """One file of weights in the user's folder.

    ``url`` is where its source has it. ``sha256`` is that of the published file as its source states it, whole or its
    first characters, or None where the source states none: the file is then "unverified". ``convert`` (published file,
    target) makes the safetensors file that the metric reads; None where the published file is read as it is. ``place``
    finds weights that a package brings, in place of the user's folder, and ``cure`` says how to get those.
    """

    file: str
    url: str | None = None
    sha256: str | None = None
    convert: Callable[[Path, Path], None] | None = None
    place: Callable[[], Path | None] | None = None
    cure: str = ""

    def path(self) -> Path:
        """Where the file lies, or would."""
        found = self.place() if self.place is not None else None
        return found if found is not None else weights_folder() / self.file

    def missing(self) -> str | None:
        """None where the file is here, else one sentence with the cure."""
        if self.path().is_file():
            return None
        if self.cure:
            return self.cure
        source = f" from {self.url}" if self.url else ""
        return f"the weights {self.path()} are not here; get them{source} with: ddil metrics --get {self.file}"

    def digest(self) -> str:
        """SHA-256 of the file as it lies here. Raises DdilError where it is not here."""
        problem = self.missing()
        if problem is not None:
            raise DdilError(problem)
        path = self.path()
        status = path.stat()
        return _sha256(path, status.st_size, status.st_mtime_ns)

    def checked(self) -> Path:
        """The file, once it is here and is the published one as far as that is known.

        Raises:
            DdilError: it is not here, or it is another file.
        """
        path = self.path()
        if self.convert is None and self.sha256 is not None:
            _compare(path, self.digest(), self.sha256)
        elif problem := self.missing():
            raise DdilError(problem)
        return path

    @property
    def check(self) -> str:
        """How far the file is held to what its source publishes, in a word."""
        if self.sha256 is None:
            return "unverified"
        return "verified" if self.convert is None else "verified when fetched, not when added converted"

    def add(self, published: Path) -> Path:
        """Take the published file, checked and converted, into the user's folder; returns its place there.

        Raises:
            DdilError: it is not the published file, does not convert, or cannot be written.
        """
        if not published.is_file():
            raise DdilError(f"{published} is not here; name the file that holds the weights {self.file}")
        as_read = self.convert is None or published.suffix == ".safetensors"
        if self.sha256 is not None and (self.convert is None or not as_read):
            _compare(published, _sha256(published, published.stat().st_size, published.stat().st_mtime_ns), self.sha256)
        target = weights_folder() / self.file
        require_cache()
        with replacing(target) as temporary:
            if self.convert is None or as_read:
                shutil.copyfile(published, temporary)
            else:
                self.convert(published, temporary)
        return target

    def get(self) -> Path:
        """Fetch the file from its source, check it, and put it into the user's folder.

        Raises:
            DdilError: it has no public source, the source cannot be reached, or what came is another file.
        """
        if self.url is None:
            raise DdilError(self.cure or f"the weights {self.file} have no public source; give them with --add")
        target = weights_folder() / f"{self.file}.fetched"
        require_cache()
        with waiting_for(weights_folder()):
            return self._get(self.url, target)

    def _get(self, url: str, target: Path) -> Path:
        try:
            with urlopen(url) as source, replacing(target) as temporary:
                with temporary.open("wb") as file:
                    self._receive(source, file)
                length = source.headers.get("Content-Length")
                if length is not None and temporary.stat().st_size != int(length):
                    raise DdilError(f"{url} broke off after {temporary.stat().st_size} of {length} bytes; try again")
            return self.add(target)
        except (URLError, ConnectionError, TimeoutError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise DdilError(
                f"{url} cannot be reached ({reason}); fetch it elsewhere and give it with: "
                f"ddil metrics --add {self.file}=FILE"
            ) from error
        finally:
            target.unlink(missing_ok=True)

    def _receive(self, source: BinaryIO, file: BinaryIO) -> None:
        try:
            shutil.copyfileobj(source, file)
        except (ConnectionError, TimeoutError, HTTPException) as error:  # before it is taken for a fault of the disk
            raise DdilError(f"the connection to {self.url} broke off ({error}); try again") from error


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; read again only where its size or time has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, digest: str, expected: str) -> None:
    if not digest.startswith(expected):
        raise DdilError(
            f"{path} is another file than its source publishes (sha256 {digest[:12]}…, expected {expected[:12]}…); "
            "delete it and get it again"
        )


def weights_folder() -> Path:
    """Where weights of metrics lie."""
    return user_folder() / "weights"
