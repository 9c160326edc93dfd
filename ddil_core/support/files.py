"""Write files whole or not at all. This project writes every file through this module.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed. If the work ends in
between, the final name holds the old file or no file. If the disk refuses, the error names the path and the free space.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.support.errors import DdilError

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial(\.[^.]+)?")
"""The temporary names of ``replacing``. A shell's ``*.json`` skips them for their leading dot; pathlib's does not."""

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""The end of a message in which a Rust library (safetensors, tokenizers) reports an error of the operating system."""


class NotWritten(DdilError):
    """The disk or the folder refuses a file.

    Attributes:
        reason: What the system says.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} could not be written ({reason}; {_free_space(path)}): make room or name another place, and run "
            "the same command again"
        )
        self.reason = reason


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write the file or folder ``path`` whole or not at all.

    Yields a temporary path in the same folder, to which the block writes. Its name is unique, so that two processes
    never share one. It keeps the suffix, because some writers choose the format by it. When the block succeeds, the
    temporary path is renamed to ``path``. It replaces a file, but not a folder. When the block fails, the temporary
    path is deleted.

    Raises:
        DdilError: the disk or the folder refuses.
    """
    temporary = path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            if file.is_file():
                _flush(file)
        temporary.replace(path)
    except Exception as error:  # libraries have errors of their own for a full disk
        reason = error.reason if isinstance(error, NotWritten) else _system_reason(error)
        if reason is None or (isinstance(error, DdilError) and not isinstance(error, NotWritten)):
            raise
        raise NotWritten(path, reason) from error
    finally:
        _delete(temporary)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all, and keep its line ends. Raises as ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    *,
    writing: Callable[[Path], AbstractContextManager[Path]] = replacing,
) -> None:
    """Write tensors as safetensors, whole or not at all.

    The tensors are contiguous and share no memory. ``writing=with_checksum`` also writes a checksum. Raises as
    ``replacing``.
    """
    from safetensors.torch import save_file

    with writing(path) as temporary:
        save_file(dict(tensors), temporary, metadata)


def sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which the library writes in a random order.

    Call this on a temporary file of ``replacing``. The tensors stay where they are.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # a header is padded with spaces
            file.seek(8)
            file.write(text.ljust(size))


def write_torch(
    path: Path, content: Any, *, writing: Callable[[Path], AbstractContextManager[Path]] = replacing
) -> None:
    """Write a file with ``torch.save``, whole or not at all. For ``writing`` see ``write_tensors``. Raises as it."""
    import torch

    with writing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch raises "unexpected pos" while it handles the system's error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file. Leave the file unchanged where the disk does not take the whole line.

    Raises:
        DdilError: the disk or the folder refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            content, size = (line + "\n").encode(), file.tell()
            try:
                written = file.write(content)
                if written != len(content):  # the disk took a part; the second try raises the reason
                    file.write(content[written:])
            except OSError:
                with suppress(OSError):  # where this fails too, half a line stays, and readers of logs skip it
                    file.truncate(size)
                raise
    except OSError as error:
        raise NotWritten(path, error.strerror or str(error)) from error


def is_temporary(path: Path) -> bool:
    """Whether a process that was killed left this file or folder in ``replacing``."""
    return _TEMPORARY.fullmatch(path.name) is not None


def delete_temporaries(*folders: Path, below: int = 0, unless: str | None = None) -> None:
    """Delete the temporary files of killed processes. Call this only on folders to which no other process writes.

    Args:
        folders: The folders.
        below: How many levels of their subfolders are searched too.
        unless: The name of a file that keeps a subfolder from being searched, such as the lock of another command.
    """
    for folder in folders:
        if not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):  # such as lost+found
            continue
        for path in [*folder.iterdir()]:
            if is_temporary(path):
                _delete(path)
            elif below and path.is_dir() and not path.is_symlink() and not (unless and (path / unless).exists()):
                delete_temporaries(path, below=below - 1, unless=unless)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.parent.is_dir():
        path.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _free_space(path: Path) -> str:
    """Say how much space is free on the disk of the nearest folder that exists."""
    for folder in path.absolute().parents:
        try:
            return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
        except OSError:
            continue
    return "its disk cannot be read"


def _system_reason(error: Exception) -> str | None:
    """Return the reason of the operating system, or None for an error of another kind."""
    if isinstance(error, OSError):
        other = "" if error.filename is None or _TEMPORARY.search(str(error.filename)) else f": {error.filename}"
        return (error.strerror or str(error)) + other
    number = _SYSTEM_ERROR.search(str(error))
    return os.strerror(int(number[1])) if number else None
