"""Check text that a user writes, write lists in sentences, and break lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ddil_core.support.errors import WrongCommand

_TOKEN = re.compile(r"[^\s/_+−-]*[/_+−-]+\s*|\S+\s*|\s+")
_NO_CHARACTER = re.compile(r"[\x00\ud800-\udfff]")


def require_text(text: str, where: str) -> None:
    """Refuse text that no tokenizer and no file takes. ``where`` starts the message.

    Raises:
        WrongCommand: the text holds a NUL, or half of a surrogate pair.
    """
    bad = _NO_CHARACTER.search(text)
    if bad is not None:
        what = "a NUL" if bad[0] == "\0" else f"U+{ord(bad[0]):04X}, half of a surrogate pair"
        raise WrongCommand(f"{where} holds {what}, which is no character of a text; write it again in UTF-8")


def listed(items: Sequence[str], word: str) -> str:
    """Return "a, b and c" for three items and the word "and"."""
    return f" {word} ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def break_text(text: str, width: int) -> str:
    """Break text into lines of at most ``width`` characters: at spaces, and after the signs / _ - + −.

    A longer part stays whole on a line of its own.
    """
    lines = [""]
    for part in _TOKEN.findall(text):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
