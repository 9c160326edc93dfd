"""Read captions. Every kind of caption file follows the same rules, which ``docs/data.md`` states."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.support import outside
from ddil_core.support.errors import WrongCommand
from ddil_core.support.outside import MEGABYTE, NotPlain, read_file
from ddil_core.support.text import require_text

CAPTION_KEYS = ("prompt", "caption", "text")
"""The keys that may hold a row's caption. The first key with a caption counts."""
NAME_KEYS = ("id", "file", "file_name")
"""The keys that may hold the name of a row's image or prompt."""

LONGEST = 20_000
"""The most characters of a caption. A text encoder reads at most some hundred words."""
CAPTION_FILE = MEGABYTE
"""The largest file of one caption."""
LIST_FILE = 500 * MEGABYTE
"""The largest list of captions or of images."""
ROWS = 5_000_000
"""The most lines of a list."""
LONGEST_LINE = MEGABYTE
"""The most characters of a line of a ``.jsonl`` file."""

_QUOTES = "put quotes around a field that holds a comma"

_LINE_END = re.compile(r"\r\n|\n|\r")
_BOM = "\ufeff"
_ENDS = _BOM + " \x7f" + "".join(map(chr, range(0x20)))
"""What is removed at a caption's ends: byte-order marks, spaces and control characters, such as DOS's end of file."""
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE starts as UTF-16-LE
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}
"""Unicode's categories of invisible characters: controls, format characters and separators."""
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Invisible letters of Hangul and an empty Braille sign."""
_KINDS = ((bool, "true or false"), (int | float, "a number"), (list, "a list"), (dict, "an object"))


def clean_caption(text: str) -> str:
    """Clean a caption: remove white space, byte-order marks and ASCII's controls at its ends, and join the rest by
    single spaces.

    Case, punctuation and spelling stay. COCO's captions contain line ends, and spaces after the full stop.
    """
    return " ".join(text.split()).strip(_ENDS)


def caption_of(value: object, where: str) -> str | None:
    """Return the cleaned caption, or None where there is no caption or only a blank one (see ``is_blank``).

    Args:
        value: What the file holds in the caption's place; None where it holds nothing.
        where: The name of that place in messages.

    Raises:
        WrongCommand: the value is not a text, or the text cannot be a caption.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise WrongCommand(f"{where} is {_kind(value)}, but a caption is one text; write it as one text")
    require_text(value, where)
    text = clean_caption(value)
    if len(text) > LONGEST:
        raise WrongCommand(
            f"{where} has {len(text):,} characters, and a caption has at most {LONGEST:,}; shorten it or leave it out"
        )
    return None if is_blank(text) else text


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or has only white space and invisible characters."""
    return all(unicodedata.category(character) in _INVISIBLE or character in _FILLERS for character in text)


def _kind(value: object) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), f"a {type(value).__name__}")


def decode(content: bytes) -> str:
    """Decode a file in UTF-8.

    A byte-order mark at the start of the file or of a line is dropped. Joining files leaves marks at later lines.

    Raises:
        ValueError: the encoding is another; the message says why and does not name the file.
    """
    if content.startswith(_OTHER_MARKS):
        raise ValueError("it starts with the mark of UTF-16 or UTF-32")
    text = content.decode("utf-8")
    if "\0" in text:
        raise ValueError("it contains a NUL character, so it may be UTF-16")
    return re.sub(rf"(\A|[\r\n]){_BOM}", r"\1", text)


def lines(text: str) -> list[str]:
    """Split a text at LF, CR LF and CR. ``str.splitlines`` would also split at U+2028, form feeds and others."""
    parts = _LINE_END.split(text)
    return parts if parts[-1] else parts[:-1]


def read_text(path: Path, most: int = LIST_FILE) -> str:
    """Read a file of captions in UTF-8.

    Raises:
        ValueError: the file is larger than ``most`` bytes, has more than ``ROWS`` lines, is no regular file, or has
            another encoding.
        OSError: the file cannot be read.
    """
    try:
        text = decode(read_file(path, most))
    except NotPlain as error:
        raise ValueError(f"it {error}") from error
    if text.count("\n") + text.count("\r") > 2 * ROWS:  # a line may end with both
        raise ValueError(f"it has more than {ROWS:,} lines")
    return text


def parse_json(text: str, values: int = outside.VALUES) -> Any:
    """Parse a JSON text with at most about ``values`` values.

    Raises:
        ValueError: the text is not JSON, passes a limit (see ``ddil_core.support.outside``), or has an object with a
            key twice.
    """
    try:
        return outside.parse_json(text, values, halves=True)  # messages on captions name their place
    except NotPlain as error:
        raise ValueError(f"it {error}") from error


def _most_frequent(names: Sequence[str]) -> str:
    return Counter(names).most_common(1)[0][0]


@dataclass(frozen=True)
class Row:
    """A row of an index or of a list of prompts: its ``values`` by key, and its place (``where``) for messages.

    Keys are in small letters.
    """

    values: dict[str, object]
    where: str

    def caption(self) -> str | None:
        """Return the row's caption, or None. Raises WrongCommand as ``caption_of`` does."""
        for key in CAPTION_KEYS:
            caption = caption_of(self.values.get(key), f"the {key!r} of {self.where}")
            if caption is not None:
                return caption
        return None

    def name(self, *keys: str) -> str | None:
        """Return the row's first value under these keys, such as an id or a file name; a number becomes its text.

        Raises:
            WrongCommand: the value is neither a text nor a number, or the text cannot be a name.
        """
        for key in keys:
            value, where = self.values.get(key), f"the {key!r} of {self.where}"
            if value is None or (isinstance(value, str) and is_blank(value)):
                continue
            number = isinstance(value, int) and not isinstance(value, bool)
            number = number or (isinstance(value, float) and math.isfinite(value))
            if not (number or isinstance(value, str)):
                kind = "not a finite number" if isinstance(value, float) else _kind(value)
                raise WrongCommand(f"{where} is {kind}, but it names an image or a prompt; write a text or a number")
            require_text(str(value), where)
            return str(value)
        return None


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a ``.jsonl`` file, or of a ``.csv`` file with a header. Blank lines are skipped.

    Raises:
        WrongCommand: the file cannot be read, or a row of a ``.csv`` file has more or fewer fields than the header.
    """
    kind = path.suffix[1:]
    try:
        text = read_text(path)
        rows = list(_csv_rows(text) if kind == "csv" else _json_lines(text))
    except (ValueError, OSError) as error:
        raise WrongCommand(f"{path} cannot be read as {kind} in UTF-8: {error}") from error
    if not all(isinstance(values, dict) for values in rows):
        raise WrongCommand(f'{path} has a line that is not a JSON object; write each line like {{"file": "a.png"}}')
    return [_row(values, f"row {number} of {path}") for number, values in enumerate(rows, 1)]


def _row(values: dict[str, object], where: str) -> Row:
    """Return a row whose keys are in small letters and without white space at the ends: ``Prompt`` is ``prompt``.

    Raises:
        WrongCommand: two keys differ in nothing else, so that one of two values would be lost.
    """
    keys = [key.strip().lower() for key in values]
    for key in (*CAPTION_KEYS, *NAME_KEYS):
        if keys.count(key) > 1:
            raise WrongCommand(f"{where} has the key {key!r} twice, in capitals and in small letters; keep one")
    return Row(dict(zip(keys, values.values(), strict=True)), where)


def _json_lines(text: str) -> Iterator[Any]:
    """Yield the value of each line of a ``.jsonl`` file. Raises ValueError."""
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            try:
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"it has more than {LONGEST_LINE:,} characters")
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _csv_rows(text: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a ``.csv`` file as {column: field}. Raises ValueError.

    ``csv.DictReader`` puts the surplus fields of a row aside, so an unquoted comma would cut a caption without a word.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    # A quote after a space opens no field, and both its quotes would become part of the caption.
    spaced = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] = []
    begins = 1
    try:
        for fields, other in zip(reader, spaced, strict=False):
            if not header:
                header = _header(other)
            elif len(fields) == len(header):
                _require_names(header, fields, begins)
                if [field.lstrip(" ") for field in fields] != [field.lstrip(" ") for field in other]:
                    raise ValueError(f"the row in line {begins} has a space before a quote; leave the space out")
                yield dict(zip(header, fields, strict=True))
            elif len(fields) > 1 or "".join(fields).strip():
                cure = _QUOTES if len(fields) > len(header) else "write a comma for each empty field"
                raise ValueError(
                    f"the row in line {begins} has {len(fields)} fields, but the header has {len(header)}; {cure}"
                )
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row in line {begins} cannot be read ({error}); close every quote") from error


def _header(fields: Sequence[str]) -> list[str]:
    """Return the column names; an empty list for a blank line. Raises ValueError."""
    names = [name.strip() for name in fields]
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise ValueError(f"its header {names[0]!r} has one column; put commas between the columns")
    known = [name for name in names if name]
    if len(set(known)) < len(known):
        raise ValueError(f"its header has the column {_most_frequent(known)!r} twice")
    return names if known else []


def _require_names(header: Sequence[str], fields: Sequence[str], line: int) -> None:
    """Refuse a value in a column without a name. The first column is exempt, as it may be a data frame's index.

    Raises:
        ValueError: a later column has a value but no name.
    """
    for place, (name, field) in enumerate(zip(header, fields, strict=True), 1):
        if place > 1 and not name and field.strip():
            raise ValueError(
                f"the row in line {line} has a value in column {place}, for which the header has no name; {_QUOTES}"
            )
