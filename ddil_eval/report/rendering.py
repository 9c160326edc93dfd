"""Tables → CSV (full precision), LaTeX (booktabs alone), JSON and the terminal; the same text each time.

For print, a column is rounded to two significant digits of its intervals' typical half-width.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.table import DOUBT, Cell, Column, Table

if TYPE_CHECKING:
    from rich.console import RenderableType

PAPER = "Paper (SD 1.5)"
MEASURED = "Measured"

_MANY, _FONTS = 8, (r"\footnotesize\setlength{\tabcolsep}{3pt}", r"\scriptsize\setlength{\tabcolsep}{2pt}")
"""So many columns, three metrics and the paper's two among them, fit a column of 345 pt in the first font; more have the second."""

_ARROWS = {"lower": "↓", "higher": "↑", None: ""}
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"$\$$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
    "*": "{*}",  # which after the end of a line would belong to the command that ends it
    "[": "{[}", "]": "{]}", "→": r"$\to$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$", "–": "--", "—": "---",
    "×": r"$\times$", "±": r"$\pm$", "≈": r"$\approx$", "≤": r"$\le$", "≥": r"$\ge$", "…": r"\dots{}", "’": "'",
    "†": r"$\dagger$", "α": r"$\alpha$", "σ": r"$\sigma$", "\u00a0": "~", "\n": " ",
}  # fmt: skip
_LIGATURES = {"--", "``", "''", "?`", "!`", ",,"}
"""Pairs of characters that TeX's fonts join into another one."""
_NOT_IN_OT1 = frozenset("«»ÐðÞþĐđŊŋĄąĘęĮįŲųĦħĸĿŀŉŦŧſ\u00ad")
"""Latin characters that LaTeX's first font encoding lacks."""
_LEVELS = (0.001, 0.01, 0.05)
"""The usual levels of significance. Rounding must not carry a p-value below one of them onto it."""


def to_csv(table: Table) -> str:
    """Header and rows; an estimate takes three columns (value, `_low`, `_high`), a tested one two more (`_p`, `_p_holm`), and an
    empty cell is empty."""
    text = io.StringIO()
    rows: list[Sequence[Any]] = [table.header(), *table.flat()]
    for row in rows:
        # With this end of a line both of its characters are quoted within a cell; written is the second alone.
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(["" if value is None else _plain(value) for value in row])
        text.write(line.getvalue().removesuffix("\r\n") + "\n")
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
        *(rf"\par\smallskip{{\footnotesize {escape(note)}\par}}" for note in _notes(table)),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_dict(table: Table) -> dict[str, Any]:
    """The table as a JSON value, at full precision; the paper's numbers as floats."""
    rows = [[float(v) if isinstance(v, Decimal) else _plain(v) for v in row] for row in table.flat()]
    names = ("group", "name", "title", "caption", "label", "notes", "missing")
    return {name: getattr(table, name) for name in names} | {
        "columns": [{"key": c.key, "source": c.source, "direction": c.direction} for c in table.columns],
        "rows": [dict(zip(table.header(), row, strict=True)) for row in rows],
        "significant": [{"row": r, "column": table.columns[c].key} for r, c in sorted(table.significant)],
        "best": [{"row": r, "column": table.columns[c].key} for r, c in sorted(table.best)],
    }


def to_rich(table: Table) -> RenderableType:
    """The table for a terminal: caption above, intervals below their values, notes after it."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in table.columns:
        header = Text(_header(column) + ("\npaper" if column.source == "paper" else ""))
        style = "cyan" if column.source == "paper" else None
        drawn.add_column(header, justify="left" if column.source == "setting" else "right", style=style)
    for r, row in enumerate(_printed(table)):
        cells = []
        for c, (value, *below) in enumerate(row):
            mark = _marks(table, r, c)
            style = "bold" if (r, c) in table.best else ""
            cells.append(Text.assemble((value + mark, style), *(("\n" + line, "dim") for line in below)))
        drawn.add_row(*cells)
    head = Text.assemble((f"{table.title}. ", "bold"), table.caption)
    notes = [Text(note, style="dim") for note in _notes(table)]
    return Group(head, Padding(drawn, (1, 2), expand=False), *notes, Text())


def escape(text: str) -> str:
    """Text for LaTeX's text mode: as it is read, so that no two characters are joined into another one.

    A character that LaTeX has neither a command nor a letter for in its first font encoding is written as its code point.
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


def _plain(value: Any) -> Any:
    """A value of a cell; minus zero is zero."""
    return value + 0.0 if isinstance(value, float) else value


def _header(column: Column) -> str:
    return f"{column.header} {_ARROWS[column.direction]}".rstrip()


def _notes(table: Table) -> list[str]:
    return [*table.notes, *([f"Not measured: {'; '.join(table.missing)}."] if table.missing else [])]


def _marks(table: Table, row: int, column: int) -> str:
    """What stands after a value: a star where it is significant, or a dagger where it is not to be trusted."""
    cell = table.rows[row][column]
    doubt = DOUBT if isinstance(cell, RecordedEstimate) and cell.note is not None else ""
    return ("*" if (row, column) in table.significant else "") + doubt


def _printed(table: Table) -> list[list[list[str]]]:
    """Each cell as its value and the lines below it: an interval, a p-value."""
    places = [_decimals([row[i] for row in table.rows]) for i in range(len(table.columns))]
    return [[_print(cell, digits) for cell, digits in zip(row, places, strict=True)] for row in table.rows]


def _decimals(cells: list[Cell]) -> int:
    """Decimals that show two significant digits of the column's typical half-width; 3 where no interval has a width."""
    halves = [
        c.high / 2 - c.low / 2 for c in cells if isinstance(c, RecordedEstimate)
    ]  # each half by itself does not overflow
    halves = [half for half in halves if half > 0]
    return min(max(1 - math.floor(math.log10(statistics.median(halves))), 0), 6) if halves else 3


def _print(cell: Cell, decimals: int) -> list[str]:
    if isinstance(cell, RecordedEstimate):
        low, value, high = (f"{number:z.{decimals}f}" for number in (cell.low, cell.value, cell.high))
        return [value, f"[{low}, {high}]", *([] if cell.p_value is None else [_print_p(cell.p_value)])]
    if isinstance(cell, float):
        return [f"{cell:z.5g}"]
    return ["" if cell is None else str(cell)]


def _print_p(p_value: float) -> str:
    """A p-value by three decimals, or as below the level that it is below and would be rounded onto."""
    shown = f"{p_value:.3f}"
    for level in _LEVELS:
        if p_value < level <= max(float(shown), _LEVELS[0]):
            return f"p < {level}"
    return f"p = {shown}"


def _latex_groups(columns: Sequence[Column]) -> list[str]:
    """A line over the header that says which columns are the paper's; none where there is none."""
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


def _latex_header(column: Column) -> str:
    """The header; a long name is broken into two lines at the underscore nearest to its middle."""
    text = _header(column)
    breaks = [i + 1 for i, c in enumerate(text) if c == "_"]
    if len(text) <= 12 or not breaks:
        return escape(text)
    middle = min(breaks, key=lambda i: abs(2 * i - len(text)))
    return rf"\shortstack[r]{{{escape(text[:middle])}\\{escape(text[middle:])}}}"


def _latex_rows(table: Table, shown: Sequence[int]) -> list[str]:
    """A line of values, and below it those of intervals and of p-values where the row has any."""
    lines = []
    for r, row in enumerate(_printed(table)):
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
    marks = _marks(table, row, column).replace(DOUBT, r"\dagger")
    return f"${bold}{f'^{{{marks}}}' if marks else ''}$"
