"""Check text that a user writes."""

from __future__ import annotations

import re

from ddil_core.support.errors import WrongCommand

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
