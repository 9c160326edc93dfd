"""A lock on a folder, so that only one command at a time writes to it.

The lock is the kernel's (``flock``) on a file inside the folder. The kernel releases it when the process ends, in
whatever way. The file names the process that holds the lock. The file is deleted when the lock is released.

Over a network file system the lock works where the system passes ``flock`` on, as NFS does. Where it refuses, a warning
says so. Where it pretends, the file of another machine's command is still there, and a warning names that command.
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
from typing import NamedTuple

from ddil_core.support import ranks
from ddil_core.support.errors import DdilError
from ddil_core.support.files import delete_temporaries
from ddil_core.support.outside import MEGABYTE, parse_json, read_file
from ddil_core.support.progress import warn

LOCK = ".ddil.lock"
"""The name of the lock's file in the folder."""

LEVELS = 4
"""How many levels of folders commands write to inside of the folder that they hold."""

_LONGEST = 200
"""The most characters of a command that a message repeats."""

_held: dict[Path, int] = {}
"""The folders that this process holds, with the number of nested calls for each."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder. Make it where it does not exist. Delete the temporary files that killed commands left in it.

    Raises:
        DdilError: another command holds the folder (the message names the command), or the folder cannot be made or
            written to.
    """
    with _holding(folder, _refuse, "name another"):
        if _held[folder.resolve()] == 1:  # not in a nested call, whose caller may be writing
            delete_temporaries(folder, below=LEVELS, unless=LOCK)
        yield


@contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """Hold a folder as ``held`` does, but wait while another command holds it. The cache uses this."""
    with _holding(folder, _wait, "set DDIL_CACHE to another"):
        yield


@contextmanager
def held_by_main(folder: Path) -> Iterator[None]:
    """Hold a folder in the main process, as ``held`` does. The other processes begin after it holds the folder."""
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
        _remove_empty(new)
        raise DdilError(
            f"the folder {folder} cannot be written to ({error.strerror or error}); make it writable or {cure}"
        ) from error
    _held[key] = 1
    try:
        yield
    finally:
        del _held[key]
        path.unlink(missing_ok=True)  # before the lock ends, so that no other process locks a file without a name
        os.close(file)
        _remove_empty(new)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that were made for a lock, the innermost first, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):  # it is not empty; with ".." in a path, one inside of it may be
            folder.rmdir()


def _locked(path: Path, busy: Callable[[int, Path], None]) -> int:
    """Return the open lock file that this process holds. ``busy`` raises, or returns when another try makes sense."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # the last holder may have deleted the empty folder
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try(file, path):
                busy(file, path)
            elif _is_named(file, path):  # otherwise the last holder deleted the file after it was opened here
                _warn_of_another_machine(path)
                try:
                    os.ftruncate(file, 0)
                    os.write(file, json.dumps(_myself()).encode())
                except OSError:  # the disk is full
                    path.unlink(missing_ok=True)
                    raise
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _try(file: int, path: Path) -> bool:
    """Whether the lock was free. On a file system without locks, warn and go on."""
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


def _warn_of_another_machine(path: Path) -> None:
    """Warn where a command on another machine took the lock and did not release it: was it killed, or does it run?"""
    held_by = _holding_process(path)
    if held_by is not None and held_by.host != socket.gethostname():
        warn(
            f"the folder {path.parent} was taken by {held_by} and not released; if that still runs, stop one of the "
            "two, because locks do not reach over this file system"
        )


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


class _Process(NamedTuple):
    """What the file of a lock says of a process."""

    host: str
    pid: int
    since: str
    command: str

    def __str__(self) -> str:
        command = self.command if len(self.command) <= _LONGEST else self.command[:_LONGEST] + "…"
        return f"process {self.pid} on {self.host} since {self.since} ({' '.join(command.split())})"


def _holding_process(path: Path) -> _Process | None:
    """Return the process that a lock's file names; None where it names none."""
    try:
        content = parse_json(read_file(path, MEGABYTE))
        return _Process(str(content["host"]), int(content["pid"]), str(content["since"]), str(content["command"]))
    except (OSError, ValueError, TypeError, KeyError):  # the file is new, or another process writes or deletes it now
        return None


def _holder(path: Path) -> str:
    """Describe the process that holds a lock."""
    return str(_holding_process(path) or "another command")
