"""Writing files: whole or not at all. Every file that this project writes goes through here.

A file is written under a temporary name beside its own, flushed to the disk, and renamed. Whatever ends the work in between, the
name holds the old file or none. What the disk does not take is one sentence with the path and the free space.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.support.errors import DdilError

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial(\.[^.]+)?")
"""The temporary names of ``replacing``. The dot in front hides them from patterns such as ``*.json``."""

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) end the message of an error of the operating system."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write the file or folder ``path`` whole or not at all.

    Yields a temporary name beside ``path``, under which the block writes. The name is unique, so that two processes never share
    one, and keeps the suffix, by which some writers choose the format. When the block ends well, it becomes ``path`` and replaces
    a file that was there, though no folder. Otherwise it is deleted.

    Raises:
        DdilError: the disk or the folder does not take it.
    """
    temporary = path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            if file.is_file():
                _flush(file)
        temporary.replace(path)
    except Exception as error:  # libraries raise kinds of their own where a disk is full
        reason = _system_reason(error)
        if isinstance(error, DdilError) or reason is None:
            raise
        raise _not_written(path, reason) from error
    finally:
        _delete(temporary)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all, with the line ends that it has. Raises as ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, contiguous and in memory of their own, as safetensors, whole or not at all. Raises as ``replacing``."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata)


def write_torch(path: Path, content: Any) -> None:
    """Write what ``torch.save`` takes, whole or not at all. Raises as ``replacing``."""
    import torch

    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's "unexpected pos", raised while it handles the system's own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; where the disk does not take all of it, the file is as it was before.

    Raises:
        DdilError: the disk or the folder does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            content, size = (line + "\n").encode(), file.tell()
            try:
                written = file.write(content)
                if written != len(content):  # the disk took a part; the next try says why
                    file.write(content[written:])
            except OSError:
                with suppress(OSError):  # where this fails too, half a line stays, which readers of logs leave out
                    file.truncate(size)
                raise
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is one that ``replacing`` left when its process was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def delete_temporaries(*folders: Path) -> None:
    """Delete what killed processes left in these folders. Only for folders that no other process writes to."""
    for folder in folders:
        if folder.is_dir():
            for path in folder.iterdir():
                if is_temporary(path):
                    _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.parent.is_dir():
        path.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _not_written(path: Path, reason: str) -> DdilError:
    return DdilError(
        f"{path} could not be written ({reason}; {_free_space(path)}): make room or name another place, and run the same command "
        "again"
    )


def _free_space(path: Path) -> str:
    """In words, on the disk of the nearest folder that exists."""
    for folder in path.absolute().parents:
        try:
            return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
        except OSError:
            continue
    return "its disk cannot be read"


def _system_reason(error: Exception) -> str | None:
    """Why the operating system refused; None where the error is of another kind."""
    if isinstance(error, OSError):
        other = "" if error.filename is None or _TEMPORARY.search(str(error.filename)) else f": {error.filename}"
        return (error.strerror or str(error)) + other
    told = _SYSTEM_ERROR.search(str(error))
    return os.strerror(int(told[1])) if told else None
