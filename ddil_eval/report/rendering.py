"""Tables → CSV (full precision), LaTeX (needs booktabs only) and JSON. Equal tables give equal text.

In print, a column is rounded to two significant digits of the median half-width of its intervals.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ddil_core.support.text import one_line
from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.table_type import DOUBT, Cell, Column, Table

PAPER = "Paper (SD 1.5)"
MEASURED = "Measured"

_MANY, _FONTS = 8, (r"\footnotesize\setlength{\tabcolsep}{3pt}", r"\scriptsize\setlength{\tabcolsep}{2pt}")
"""With at most this number of columns, a table fits 345 pt in the first font. Larger tables use the second font."""

_ARROWS = {"lower": "↓", "higher": "↑", None: ""}
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"$\$$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
    "*": "{*}",  # a bare star at the start of a line would belong to the \\ before it
    "[": "{[}", "]": "{]}", "→": r"$\to$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$", "–": "--", "—": "---",
    "×": r"$\times$", "±": r"$\pm$", "≈": r"$\approx$", "≤": r"$\le$", "≥": r"$\ge$", "…": r"\dots{}", "’": "'",
    "†": r"$\dagger$", "α": r"$\alpha$", "σ": r"$\sigma$", "\u00a0": "~", "\n": " ",
}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""The starts of a formula in spreadsheets, which read full-width signs as well."""
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_LIGATURES = {"--", "``", "''", "?`", "!`", ",,"}
"""Pairs of characters that TeX's fonts join into one."""
_NOT_IN_OT1 = frozenset("«»ÐðÞþĐđŊŋĄąĘęĮįŲųĦħĸĿŀŉŦŧſ\u00ad")
"""Latin characters that LaTeX's first font encoding lacks."""
_LEVELS = (0.001, 0.01, 0.05)
"""The usual levels of significance. Rounding must not move a p-value from below a level onto it."""


def to_csv(table: Table) -> str:
    """Return the table as CSV, with the columns of ``Table.header``. An empty cell is an empty text."""
    text = io.StringIO()
    rows: list[Sequence[Any]] = [table.header(), *table.flat()]
    csv.writer(text, lineterminator="\n").writerows([_csv_value(value) for value in row] for row in rows)
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A float that compiles with `\\usepackage{booktabs}` alone; intervals stand below their values."""
    shown = [i for i, c in enumerate(table.columns) if not c.in_caption]
    columns = [table.columns[i] for i in shown]
    lines = [
        r"\begin{table}[tb]",
        r"\centering",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\label{{{table.label}}}",
        r"\medskip" + (_FONTS[0] if len(columns) <= _MANY else _FONTS[1]),
        rf"\begin{{tabular}}{{@{{}}{''.join('l' if c.source == 'setting' else 'r' for c in columns)}@{{}}}}",
        r"\toprule",
        *_latex_groups(columns),
        " & ".join(_latex_header(c) for c in columns) + r" \\",
        r"\midrule",
        *_latex_rows(table, shown),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip{{\footnotesize {escape(note)}\par}}" for note in notes_below(table)),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_dict(table: Table) -> dict[str, Any]:
    """Return the table as a JSON value at full precision. The paper's numbers become floats."""
    rows = [[float(v) if isinstance(v, Decimal) else _plain(v) for v in row] for row in table.flat()]
    names = ("group", "name", "title", "caption", "label", "notes", "missing")
    return {name: getattr(table, name) for name in names} | {
        "columns": [{"key": c.key, "source": c.source, "direction": c.direction} for c in table.columns],
        "rows": [dict(zip(table.header(), row, strict=True)) for row in rows],
        "significant": [{"row": r, "column": table.columns[c].key} for r, c in sorted(table.significant)],
        "best": [{"row": r, "column": table.columns[c].key} for r, c in sorted(table.best)],
    }


def escape(text: str) -> str:
    """Escape text for LaTeX's text mode. TeX joins no two of its characters.

    A character without a command and without a letter in the OT1 encoding becomes its code point.
    """
    escaped = ""
    for character in text:
        piece = _latex_character(character)
        escaped += "{}" + piece if escaped[-1:] + piece[:1] in _LIGATURES else piece
    return escaped


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character in "\t\r":
        return " "
    has_letter = character.isprintable() and ord(character) < 0x180 and character not in _NOT_IN_OT1
    return character if has_letter else rf"\texttt{{U+{ord(character):04X}}}"


def _csv_value(value: Any) -> Any:
    """Return the value of a cell in CSV. A text is one line, and no spreadsheet takes it for a formula.

    A formula gets an apostrophe in front, which spreadsheets do not show (OWASP, CSV injection).
    """
    if not isinstance(value, str):
        return "" if value is None else _plain(value)
    text = one_line(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def _plain(value: Any) -> Any:
    """Return the value of a cell, with 0 for −0."""
    return value + 0.0 if isinstance(value, float) else value


def header_text(column: Column) -> str:
    """Return a column's header with the arrow of its direction."""
    return f"{column.header} {_ARROWS[column.direction]}".rstrip()


def notes_below(table: Table) -> list[str]:
    """Return the sentences below a table, with what was not measured."""
    return [*table.notes, *([f"Not measured: {'; '.join(table.missing)}."] if table.missing else [])]


def marks_after(table: Table, row: int, column: int) -> str:
    """Return the marks after a value: a star if it is significant, a dagger if it is not reliable."""
    cell = table.rows[row][column]
    doubt = DOUBT if isinstance(cell, RecordedEstimate) and cell.note is not None else ""
    return ("*" if (row, column) in table.significant else "") + doubt


def printed_cells(table: Table) -> list[list[list[str]]]:
    """Return the lines of each cell: its value, then its interval and its p-value, if it has them."""
    places = [decimals_of([row[i] for row in table.rows]) for i in range(len(table.columns))]
    return [[print_cell(cell, digits) for cell, digits in zip(row, places, strict=True)] for row in table.rows]


def decimals_of(cells: Sequence[Cell]) -> int:
    """Return the decimals for two significant digits of the median half-width; 3 if no interval has a width."""
    # high − low can overflow, the difference of the halves cannot
    halves = [c.high / 2 - c.low / 2 for c in cells if isinstance(c, RecordedEstimate)]
    halves = [half for half in halves if half > 0]
    return min(max(1 - math.floor(math.log10(statistics.median(halves))), 0), 6) if halves else 3


def print_cell(cell: Cell, decimals: int) -> list[str]:
    """Return the lines of a cell: its value, then its interval and its p-value, if it has them."""
    if isinstance(cell, RecordedEstimate):
        low, value, high = (f"{number:z.{decimals}f}" for number in (cell.low, cell.value, cell.high))
        return [value, f"[{low}, {high}]", *([] if cell.p_value is None else [print_p(cell.p_value)])]
    if isinstance(cell, float):
        return [f"{cell:z.5g}"]
    return ["" if cell is None else str(cell)]


def print_p(p_value: float, form: str = ".3f") -> str:
    """Return a p-value in a format, or "p < level" if rounding would move it onto that level."""
    shown = f"{p_value:{form}}"
    for level in _LEVELS:
        if p_value < level <= max(float(shown), _LEVELS[0]):
            return f"p < {level}"
    return f"p = {shown}"


def _latex_groups(columns: Sequence[Column]) -> list[str]:
    """Return a line above the header that marks the columns with the paper's numbers; nothing if the table has none."""
    if not any(c.source == "paper" for c in columns):
        return []
    titles, rules, start = [], [], 1
    for source, members in itertools.groupby(columns, key=lambda c: c.source):
        width = len(list(members))
        name = {"setting": "", "measured": MEASURED, "paper": PAPER}[source]
        titles.append(rf"\multicolumn{{{width}}}{{c}}{{{name}}}" if name else " & ".join([""] * width))
        rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] if name else []
        start += width
    return [" & ".join(titles) + r" \\", " ".join(rules)]


def header_lines(column: Column) -> list[str]:
    """Return the header. A long name is broken into two lines at the underscore nearest to its middle."""
    text = header_text(column)
    breaks = [i + 1 for i, c in enumerate(text) if c == "_"]
    if len(text) <= 12 or not breaks:
        return [text]
    middle = min(breaks, key=lambda i: abs(2 * i - len(text)))
    return [text[:middle], text[middle:]]


def _latex_header(column: Column) -> str:
    lines = [escape(line) for line in header_lines(column)]
    return lines[0] if len(lines) == 1 else rf"\shortstack[r]{{{lines[0]}\\{lines[1]}}}"


def _latex_rows(table: Table, shown: Sequence[int]) -> list[str]:
    """Return a line of values for each row, with lines of intervals and p-values below, if the row has any."""
    lines = []
    for r, row in enumerate(printed_cells(table)):
        lines.append(" & ".join(_latex_value(table, r, c, row[c][0]) for c in shown) + r" \\")
        for place in range(1, max(len(row[c]) for c in shown)):
            below = [row[c][place] if place < len(row[c]) else "" for c in shown]
            lines.append(" & ".join(rf"{{\scriptsize ${text}$}}" if text else "" for text in below) + r" \\")
        if any(len(row[c]) > 1 for c in shown):
            lines[-1] += "[2pt]"
    return lines


def _latex_value(table: Table, row: int, column: int, value: str) -> str:
    if not value or table.columns[column].source == "setting":
        return escape(value)
    bold = rf"\mathbf{{{value}}}" if (row, column) in table.best else value
    marks = marks_after(table, row, column).replace(DOUBT, r"\dagger")
    return f"${bold}{f'^{{{marks}}}' if marks else ''}$"
