"""Read files from outside within limits: regular files of a limited size, and JSON of a limited depth and count.

``plain_yaml`` does the same for YAML. ``docs/safety.md`` lists the limits.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

MEGABYTE = 10**6

DESCRIPTION = 16 * MEGABYTE
"""The largest file of JSON that describes a model. The vocabularies of CLIP and T5 take 1 and 2.4 MB."""

DEPTH = 64
"""The deepest nesting of a JSON text."""

VALUES = 2_000_000
"""The most values in a JSON text: commas and brackets, which are at least as many, and are counted before parsing."""

DIGITS = 1000
"""The most digits of a whole number in a JSON text."""


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that may be half of a surrogate pair."""


class NotPlain(ValueError):
    """A file or a text passes a limit or holds more than plain values. The message starts with a verb."""


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes. A pipe or a device does not hang the command.

    Raises:
        NotPlain: the file is larger, or is no regular file.
        OSError: the file cannot be opened or read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotPlain("is no regular file")
        content = file.read(most + 1) if status.st_size <= most else b""
    if status.st_size > most or len(content) > most:  # a file of /proc states no size
        raise NotPlain(f"is larger than {size_words(most)}")
    return content


def require_regular(path: Path) -> None:
    """Refuse a pipe, a device or a folder, on which a library would wait or fail.

    Raises:
        OSError: the path is there and is no regular file, or cannot be examined.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def size_words(size: int) -> str:
    """Return a limit in words: 16 MB, 2 GB."""
    return f"{size / 10**9:g} GB" if size >= 10**9 else f"{size / MEGABYTE:g} MB"


def parse_json(text: str | bytes, values: int = VALUES, *, halves: bool = False) -> Any:
    """Parse a JSON text in UTF-8. NaN and infinities are read, as Python does.

    Args:
        text: The text.
        values: About the most values.
        halves: Whether halves of surrogate pairs are read. No file and no terminal takes them.

    Raises:
        NotPlain: the text passes a limit, has an object with a key twice, or holds half of a surrogate pair. The
            message starts with a verb.
        ValueError: the text is not JSON.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if text.count(",") + text.count("[") + text.count("{") > values:
        raise NotPlain(f"holds more than {values:,} values")
    try:
        content = json.loads(text, object_pairs_hook=_each_once, parse_int=_whole)
    except RecursionError:
        refuse_depth()
    level = [content]
    for _ in range(DEPTH):
        level = [item for value in level for item in _inner(value) if isinstance(item, dict | list)]
        if not level:
            break
    else:
        refuse_depth()
    if not halves and _HALF.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise NotPlain("holds half of a surrogate pair, which is no character") from error
    return content


def refuse_depth() -> NoReturn:
    """Raise NotPlain for values that are nested too deeply."""
    raise NotPlain(f"is nested more than {DEPTH} levels deep")


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise NotPlain(f"holds a number of {len(text):,} digits")
    return int(text)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, and refuse a key that occurs twice: ``json`` would drop one of the two values."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotPlain(f"has an object with the key {twice[:60]!r} twice")
    return values


def newer(what: str, content: Any, known: int) -> str | None:
    """Return the message for a file of a later version of its layout, or None for any other content.

    Args:
        what: The file, which starts the message.
        content: What it holds: a mapping with ``schema_version``, and perhaps the ``versions`` of packages.
        known: The newest version that is read here.
    """
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version <= known:
        return None
    packages = content.get("versions")
    ddil = packages.get("ddil") if isinstance(packages, dict) else None
    by = f"a newer ddil ({ddil})" if isinstance(ddil, str) and len(ddil) < 40 else "a newer ddil"
    return (
        f"{what} was made by {by}: it has schema {version}, and this ddil reads schema {known}; update ddil to read it"
    )


def inside(name: str) -> bool:
    """Whether a file name from a file stays in its folder: it is relative, and no part of it is ``..``."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and not Path(name).is_absolute()
