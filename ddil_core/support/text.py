"""Check text that a user writes, write lists in sentences, and break lines."""

from __future__ import annotations

import re
import unicodedata
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


_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's categories of control characters, halves of surrogate pairs, and separators of lines and paragraphs."""
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a terminal show the text after them in another order."""


def printable(text: str) -> str:
    """Escape what a terminal obeys and does not show, such as control characters. Line ends stay.

    Names of files, members of archives, captions and records come from elsewhere. Through this function they can
    neither move the cursor nor set a title, and what is shown is what they are.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(_escaped(c) if c != "\n" else c for c in text)


def one_line(text: str) -> str:
    """Write a message on one line that every terminal can print, as ``printable`` does."""
    return printable(text).replace("\n", "\\n")


def is_hidden(character: str) -> bool:
    """Whether a terminal obeys a character and does not show it, or cannot print it."""
    return unicodedata.category(character) in _HIDDEN or character in _REORDERING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode() if is_hidden(character) else character


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
