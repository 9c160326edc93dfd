"""Check paths that a user names. A path that cannot be used gives one sentence."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ddil_core.support.errors import WrongCommand

_SHOWN = 200
"""The most characters of a user's text that a message repeats."""

_ROOM = 256
"""The bytes of a path's length that are kept free for the files inside a folder."""

_LONGEST = 4096
"""The longest path on Linux in bytes (PATH_MAX). Systems with a lower limit raise errors of their own."""


def shown(text: object) -> str:
    """Quote a user's text for a message, on one line. Cut a long text."""
    whole = str(text)
    if len(whole) <= _SHOWN:
        return repr(whole)
    return f"{whole[:_SHOWN]!r}… ({len(whole):,} characters)"


def user_path(text: str | os.PathLike[str], what: str = "the path") -> Path:
    """Return the path that a user wrote, with ``~`` and ``~name`` expanded. The path need not exist.

    ``what`` starts the message of an error, as in "the folder of --out".

    Raises:
        WrongCommand: the path is empty or cannot be a name, the user of ``~`` has no home folder, or the system cannot
            examine the path: it is too long, its links form a circle, or a folder on the way is closed.
    """
    written = os.fspath(text)
    if not written:
        raise WrongCommand(f"{what} is empty; name a file or a folder")
    if "\0" in written:
        raise WrongCommand(f"{what} {shown(written)} holds a NUL character, which no name can; leave it out")
    try:
        os.fsencode(written)
    except UnicodeEncodeError as error:
        raise WrongCommand(f"{what} {shown(written)} is no text that can be a name; use other characters") from error
    try:
        path = Path(written).expanduser()
    except RuntimeError as error:
        user = Path(written).parts[0]
        whose = "this user" if user == "~" else f"a user {shown(user[1:])}"
        raise WrongCommand(
            f"{what} {shown(written)} starts with {shown(user)}, and {whose} has no home folder here; "
            "write the path out"
        ) from error
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # a path that a command will make need not exist
    except OSError as error:
        raise WrongCommand(f"{what} {shown(written)} cannot be used: {error.strerror}; name another") from error
    return path


def output_folder(text: str | os.PathLike[str], what: str) -> Path:
    """Return the folder into which a command writes, as :func:`user_path` does.

    It exists and is writable, or can be made.

    Raises:
        WrongCommand: the path or a part of it is no folder, or the folder is not writable.
    """
    path = user_path(text, what)
    _require_room(path, what, _ROOM)
    if path.exists() and not path.is_dir():
        raise WrongCommand(f"{what} {shown(path)} is no folder; name another")
    _require_writable(path, path, what)
    return path


def output_file(text: str | os.PathLike[str], what: str) -> Path:
    """Return the file or folder that a command makes, as :func:`user_path` does.

    Its folder is writable, or can be made.

    Raises:
        WrongCommand: the path has no name at its end, a part of it is no folder, or its folder is not writable.
    """
    path = user_path(text, what)
    _require_room(path, what, 0)
    if not path.name:
        raise WrongCommand(f"{what} {shown(path)} is no name of a file; name one")
    _refuse_dangling(path, what)
    _require_writable(path, path.parent, what)
    return path


def _require_room(path: Path, what: str, room: int) -> None:
    if len(os.fsencode(path.absolute())) > _LONGEST - room:
        raise WrongCommand(f"{what} {shown(path)} is too long to hold files; name another")


def _refuse_dangling(path: Path, what: str) -> None:
    if path.is_symlink() and not path.exists():
        raise WrongCommand(
            f"{what} {shown(path)} leads over the link {path}, whose target does not exist; name another"
        )


def _refuse_long_names(path: Path, here: Path, what: str) -> None:
    """Refuse names that are too long for the file system of the folder ``here``.

    ``user_path`` does not reach missing parts.
    """
    longest = os.pathconf(here, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    long = [name for name in path.parts if len(os.fsencode(name)) > longest]
    if long:
        raise WrongCommand(f"{what} {shown(path)} has a name of more than {longest} bytes; name another")


def _require_writable(path: Path, folder: Path, what: str) -> None:
    """Try a temporary file in the folder, or in the nearest folder above that exists. Messages show ``path``."""
    here = folder.absolute()
    while not here.exists():
        if here.is_symlink():
            raise WrongCommand(
                f"{what} {shown(path)} leads over the link {here}, whose target does not exist; name another"
            )
        here = here.parent
    if not here.is_dir():
        raise WrongCommand(f"{what} {shown(path)} lies under {here}, which is no folder; name another")
    _refuse_long_names(path, here, what)
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        raise WrongCommand(f"{what} {shown(path)} cannot be written, as {here} takes no files: {error.strerror}; "
                           "name another, or make it writable") from error  # fmt: skip
