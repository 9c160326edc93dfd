"""Captions: one reader and one set of rules for every kind of file that holds them. ``docs/data.md`` states the rules."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.support.errors import WrongCommand
from ddil_core.support.text import require_text

CAPTION_KEYS = ("prompt", "caption", "text")
"""The keys of a row that may hold its caption; the first that holds one is taken."""

_QUOTES = "put quotes around a field that holds a comma"

_LINE_END = re.compile(r"\r\n|\n|\r")
_BOM = "\ufeff"
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins as UTF-16-LE does
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}
"""Unicode's categories of characters that show nothing: controls, format characters, separators."""
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters of Hangul and a sign of Braille that show nothing."""
_KINDS = ((bool, "true or false"), (int | float, "a number"), (list, "a list"), (dict, "an object"))


def clean_caption(text: str) -> str:
    """The one way in which captions are cleaned: white space at the ends goes, any other run of it becomes one space.

    A byte-order mark at the ends goes too. Case, punctuation and spelling stay. COCO has captions with line ends and with
    spaces after the full stop.
    """
    return " ".join(text.split()).strip(_BOM + " ")


def caption_of(value: object, where: str) -> str | None:
    """A cleaned caption; None where there is none, or a blank one, which shows no character.

    Args:
        value: what a caption file holds at the place of a caption; None where it holds nothing.
        where: the name of that place in messages.

    Raises:
        WrongCommand: it is no text, or a text that cannot be a caption.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise WrongCommand(f"{where} is {_kind(value)}, and a caption is one text; write it as one text")
    require_text(value, where)
    text = clean_caption(value)
    return None if is_blank(text) else text


def is_blank(text: str) -> bool:
    """Whether a text shows no character: it is empty, or holds white space and zero-width characters alone."""
    return all(unicodedata.category(character) in _INVISIBLE or character in _FILLERS for character in text)


def _kind(value: object) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), f"a {type(value).__name__}")


def decode(content: bytes) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark.

    A mark at the beginning of a later line, which joining files leaves, is dropped as well.

    Raises:
        ValueError: it is in another encoding; the message says why, without naming the file.
    """
    if content.startswith(_OTHER_MARKS):
        raise ValueError("it begins as UTF-16 and UTF-32 do")
    text = content.decode("utf-8")
    if "\0" in text:
        raise ValueError("it holds a NUL, as UTF-16 read as UTF-8 does")
    return re.sub(rf"(\A|[\r\n]){_BOM}", r"\1", text)


def lines(text: str) -> list[str]:
    """The lines of a text. They end at LF, CR LF or CR alone: ``str.splitlines`` also splits at U+2028, form feeds and others."""
    found = _LINE_END.split(text)
    return found if found[-1] else found[:-1]


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or an object in it has a key twice, so that one value would be lost.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice([key for key, _ in pairs])!r} stands twice in one object")
    return found


def _twice(names: Sequence[str]) -> str:
    """The name that stands most often."""
    return Counter(names).most_common(1)[0][0]


@dataclass(frozen=True)
class Row:
    """A row of an index or a list: its values by key, and ``where`` it stands, for messages."""

    values: dict[str, Any]
    where: str

    def caption(self) -> str | None:
        """The row's caption, None where it has none. Raises WrongCommand as ``caption_of``."""
        for key in CAPTION_KEYS:
            found = caption_of(self.values.get(key), f"the {key!r} of {self.where}")
            if found is not None:
                return found
        return None

    def name(self, *keys: str) -> str | None:
        """The first of these keys that the row has a name for, such as an id or a file: a text, or a number as text.

        Raises:
            WrongCommand: it is neither, or cannot be a name.
        """
        for key in keys:
            value, where = self.values.get(key), f"the {key!r} of {self.where}"
            if value is None or (isinstance(value, str) and is_blank(value)):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number or isinstance(value, str)):
                kind = "no finite number" if isinstance(value, float) else _kind(value)
                raise WrongCommand(f"{where} is {kind}, and it names a picture or a prompt; write a text or a number")
            require_text(str(value), where)
            return str(value)
        return None


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``.jsonl`` file, or of a ``.csv`` file with a header. Blank lines are no rows.

    Raises:
        WrongCommand: it is not such a file, or a row of a ``.csv`` file has more or fewer fields than the header.
    """
    kind = path.suffix[1:]
    try:
        text = decode(path.read_bytes())
        found = list(_table(text) if kind == "csv" else _objects(text))
    except (ValueError, OSError) as error:
        raise WrongCommand(f"{path} cannot be read as {kind} in UTF-8: {error}") from error
    if not all(isinstance(values, dict) for values in found):
        raise WrongCommand(f'{path} holds a line that is no JSON object; each line is one, such as {{"file": "a.png"}}')
    return [Row(values, f"row {number} of {path}") for number, values in enumerate(found, 1)]


def _objects(text: str) -> Iterator[Any]:
    """What each line of a ``.jsonl`` file holds. Raises ValueError."""
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _table(text: str) -> Iterator[dict[str, str]]:
    """The rows of a ``.csv`` file by the names of its header. Raises ValueError.

    ``csv.DictReader`` is not used, since it keeps the surplus fields of a row apart, so that an unquoted comma cuts a caption.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    begins = 1
    try:
        for fields in reader:
            if not header:
                header = _header(fields)
            elif len(fields) == len(header):
                _require_names(header, fields, begins)
                yield dict(zip(header, fields, strict=True))
            elif len(fields) > 1 or "".join(fields).strip():
                cure = _QUOTES if len(fields) > len(header) else "give it a comma for each field that it leaves empty"
                raise ValueError(
                    f"the row in line {begins} has {len(fields)} fields, and the header {len(header)}; {cure}"
                )
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row that begins in line {begins} is no row ({error}); is a quote left open?") from error


def _header(fields: Sequence[str]) -> list[str]:
    """The names of the columns; none where the line is blank. Raises ValueError."""
    names = [name.strip() for name in fields]
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise ValueError(f"its header {names[0]!r} is one column; put commas between the columns")
    known = [name for name in names if name]
    if len(set(known)) < len(known):
        raise ValueError(f"its header has the column {_twice(known)!r} twice")
    return names if known else []


def _require_names(header: Sequence[str], fields: Sequence[str], line: int) -> None:
    """Whether all values of a row have a name; the first column may have none, as that of a data frame's index.

    Raises:
        ValueError: a later value has none, such as the rest of a caption with a comma where the header ends in one.
    """
    for place, (name, field) in enumerate(zip(header, fields, strict=True), 1):
        if place > 1 and not name and field.strip():
            raise ValueError(
                f"the row in line {line} has a value in column {place}, which has no name in the header; {_QUOTES}"
            )
