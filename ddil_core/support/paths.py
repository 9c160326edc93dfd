"""Paths that a user names: expanded and looked at once, with one sentence for those that cannot be used."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path

from ddil_core.support.errors import WrongCommand

_SHOWN = 200
"""How many characters of a user's text a message repeats."""

_ROOM = 256
"""How many bytes of a path's length are left for the files inside a folder."""

_LONGEST = 4096
"""Bytes of a path on Linux (PATH_MAX); other systems have less and say so themselves."""


def shown(text: object) -> str:
    """A user's text for a message, in quotes: on one line, and cut where it is long."""
    whole = str(text)
    if len(whole) <= _SHOWN:
        return repr(whole)
    return f"{whole[:_SHOWN]!r}… ({len(whole):,} characters)"


def one_line(text: str) -> str:
    """A message on one line that every terminal can print: control characters and halves of pairs as escapes."""
    hidden = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode() if unicodedata.category(c) in hidden else c for c in text
    )


def user_path(text: str | os.PathLike[str], what: str = "the path") -> Path:
    """The path that a user wrote, with ``~`` and ``~name`` expanded; it need not exist. ``what`` starts the message.

    Raises:
        WrongCommand: it is empty or cannot be the name of a file; its user has no home folder; or it cannot be looked at, as it
            is too long, links go in a circle, or a folder on its way is closed.
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
            f"{what} {shown(written)} starts with {shown(user)}, and {whose} has no home folder here; write the path out"
        ) from error
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is to be made need not exist
    except OSError as error:
        raise WrongCommand(f"{what} {shown(written)} cannot be used: {error.strerror}; name another") from error
    return path


def output_folder(text: str | os.PathLike[str], what: str) -> Path:
    """The folder that a command is to write into, as :func:`user_path`; it is here and takes files, or can be made.

    Raises:
        WrongCommand: it is no folder, or lies under what is none, or does not take files.
    """
    path = user_path(text, what)
    _require_room(path, what, _ROOM)
    if path.exists() and not path.is_dir():
        raise WrongCommand(f"{what} {shown(path)} is no folder; name another")
    _require_writable(path, path, what)
    return path


def output_file(text: str | os.PathLike[str], what: str) -> Path:
    """A file or folder that a command is to make, as :func:`user_path`; the folder that it lies in takes files or can be made.

    Raises:
        WrongCommand: its name is none, or it lies under what is no folder, or the folder does not take files.
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
    """Refuse names that the file system of the folder ``here`` does not take; looking at a path does not reach the missing ones."""
    longest = os.pathconf(here, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    long = [name for name in path.parts if len(os.fsencode(name)) > longest]
    if long:
        raise WrongCommand(f"{what} {shown(path)} has a name of more than {longest} bytes; name another")


def _require_writable(path: Path, folder: Path, what: str) -> None:
    """Try a file without a name in the folder, or in the nearest one above it that is here; messages show ``path``."""
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
