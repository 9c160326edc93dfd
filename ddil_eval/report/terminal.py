"""Tables for a terminal of any width: no word is broken. Columns that do not fit stand in further blocks below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from ddil_core.support.text import break_text, one_line
from ddil_eval.report.rendering import header_lines, header_text, marks_after, notes_below, printed_cells
from ddil_eval.report.table_type import Table

INDENT = 2
"""Empty columns at the left of a table."""
_NAME, _SETTING = 24, 14
"""The width to which a narrow table breaks the names of its rows, and the other settings of its rows."""


def to_rich(table: Table) -> RenderableType:
    """Return the table for a terminal: the caption, the cells with intervals below their values, and the notes."""
    return _Printed(table)


@dataclass(frozen=True)
class _Printed:
    """A table that chooses its form when the width is known."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((f"{one_line(self.table.title)}. ", "bold"), one_line(self.table.caption))
        for block in _blocks(self.table, console, options.update(width=max(1, options.max_width - INDENT))):
            yield Padding(block, (1, 0, 1, INDENT), expand=False)
        for note in notes_below(self.table):
            yield Text(one_line(note), style="dim")
        yield Text()


def _blocks(table: Table, console: Console, options: ConsoleOptions) -> list[RichTable]:
    """Return the table in the first form that fits.

    The forms are: whole; with broken headers and names, and without columns that the caption states; as blocks, each of
    which begins with the first column.
    """

    def width(block: RichTable) -> int:
        return Measurement.get(console, options.update(width=10_000), block).maximum

    whole = _block(table, range(len(table.columns)), narrow=False)
    if width(whole) <= options.max_width:
        return [whole]
    first, *others = places = [place for place, column in enumerate(table.columns) if not column.in_caption]
    # A block is as wide as its columns and what lies between them, so that each column is measured once.
    widths = {place: width(_block(table, [place], narrow=True)) for place in places}
    between = width(_block(table, places[:2], narrow=True)) - sum(widths[place] for place in places[:2])
    groups: list[list[int]] = [[first]]
    for place in others:
        wider = [*groups[-1], place]
        if len(wider) > 2 and sum(widths[one] + between for one in wider) - between > options.max_width:
            groups.append([first])
        groups[-1].append(place)
    return [_block(table, group, narrow=True) for group in groups]


def _block(table: Table, places: Sequence[int], *, narrow: bool) -> RichTable:
    """Return the columns at these places. ``narrow`` breaks headers at underscores and settings between words."""
    between = (0, 1, 0, 0) if narrow else (0, 1)
    block = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=between)
    for place in places:
        column = table.columns[place]
        lines = [one_line(line) for line in (header_lines(column) if narrow else [header_text(column)])]
        header = Text("\n".join([*lines, *(["paper"] if column.source == "paper" else [])]))
        style = "cyan" if column.source == "paper" else None
        block.add_column(header, justify="left" if column.source == "setting" else "right", style=style)
    for r, row in enumerate(printed_cells(table)):
        cells = []
        for place in places:
            value, *below = (one_line(line) for line in row[place])
            if narrow and table.columns[place].source == "setting":
                value = break_text(value, _SETTING if place else _NAME)
            style = "bold" if (r, place) in table.best else ""
            value += marks_after(table, r, place)
            cells.append(Text.assemble((value, style), *(("\n" + line, "dim") for line in below)))
        block.add_row(*cells)
    return block
