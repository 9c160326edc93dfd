"""One command at a time on a folder: a lock that names its holder.

The lock is the kernel's own (``flock``) on a file inside the folder, so that it ends with the process that holds it, however that
process ends. The file says who holds it. It is deleted when the lock is given back.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ddil_core.support import ranks
from ddil_core.support.errors import DdilError
from ddil_core.support.progress import warn

LOCK = ".ddil.lock"
"""The name of the file in the folder that is held."""

_LONGEST = 200
"""Characters of a command that a sentence repeats."""

_held: dict[Path, int] = {}
"""Folders that this process holds, each with how many times; a command may hold one that a part of it holds too."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where it is not there.

    Raises:
        DdilError: another command holds it, or the folder cannot be made or written to. The sentence names the holder.
    """
    with _holding(folder, _refuse, "name another"):
        yield


@contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """As ``held``, but wait while another command holds the folder: for the cache, whose content both commands want."""
    with _holding(folder, _wait, "set DDIL_CACHE to another"):
        yield


@contextmanager
def held_by_main(folder: Path) -> Iterator[None]:
    """As ``held``; of several processes the main one holds the folder, and the others begin once it does."""
    with ExitStack() as stack:
        with ranks.main_first():
            if ranks.is_main():
                stack.enter_context(held(folder))
        yield


@contextmanager
def _holding(folder: Path, busy: Callable[[int, Path], None], cure: str) -> Iterator[None]:
    key = folder.resolve()
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    path, new = folder / LOCK, [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        file = _locked(path, busy)
    except OSError as error:
        raise DdilError(
            f"the folder {folder} cannot be written to ({error.strerror or error}); make it writable or {cure}"
        ) from error
    _held[key] = 1
    try:
        yield
    finally:
        del _held[key]
        path.unlink(missing_ok=True)  # while it is held, so that nobody can hold a file that has no name any more
        os.close(file)
        with suppress(OSError):  # the folder holds something, as it should
            for place in new:
                place.rmdir()


def _locked(path: Path, busy: Callable[[int, Path], None]) -> int:
    """An open lock file that this process holds. ``busy`` refuses, or returns once it is worth another try."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # a holder that wrote nothing deletes the folder that it made
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try(file, path):
                busy(file, path)
            elif _is_named(file, path):  # else its last holder deleted it after it was opened here
                os.ftruncate(file, 0)
                os.write(file, json.dumps(_myself()).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _try(file: int, path: Path) -> bool:
    """Whether the lock was free. A file system without locks lets everyone in, with a warning."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn(f"the folder {path.parent} cannot be locked ({error.strerror}); start no second command on it")
    return True


def _wait(file: int, path: Path) -> None:
    import fcntl

    warn(f"the folder {path.parent} is in use by {_holder(path)}; this command waits until it is free")
    fcntl.flock(file, fcntl.LOCK_EX)


def _refuse(file: int, path: Path) -> None:
    raise DdilError(
        f"the folder {path.parent} is in use by {_holder(path)}; wait until that ends, or name another folder"
    )


def _is_named(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _myself() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
    }


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        told = json.loads(path.read_bytes())
        command = str(told["command"])
        command = command if len(command) <= _LONGEST else command[:_LONGEST] + "…"
        return f"process {told['pid']} on {told['host']} since {told['since']} ({' '.join(command.split())})"
    except (OSError, ValueError, TypeError, KeyError):  # it is just being written, or was deleted since
        return "another command"
