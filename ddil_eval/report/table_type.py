"""A table as data: columns, rows and marks. ``tables`` makes it from records, and ``rendering`` makes text of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from ddil_eval.report.records import Direction, Record, RecordedEstimate

DOUBT = "†"
"""Marks an estimate that is not reliable; a note below the table says why."""

Cell = RecordedEstimate | Decimal | float | int | str | None
"""A number of the paper is a Decimal, which keeps the printed digits. None is an empty cell."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: The header in CSV.
        header: The header in print.
        source: Where the values come from: the setting, the measurement, or the paper.
        direction: Which values are better, for the header.
        interval: The cells are estimates with an interval.
        tested: The estimates are differences with a p-value.
        noted: At least one estimate has a note, since it is not reliable.
        in_caption: The caption contains the values too, so that LaTeX leaves out the column to save space.
    """

    key: str
    header: str
    source: Literal["setting", "measured", "paper"] = "setting"
    direction: Direction | None = None
    interval: bool = False
    tested: bool = False
    noted: bool = False
    in_caption: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """The suffixes of the columns in CSV."""
        tests = ("_p", "_p_holm") if self.tested else ()
        return ("", *(("_low", "_high") if self.interval else ()), *tests, *(("_note",) if self.noted else ()))


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        group: The name of the setting that all rows share.
        name: The name of the table within the group.
        title: The title.
        caption: What the table shows, and the shared setting.
        columns: The columns.
        rows: One tuple of cells for each row.
        notes: Sentences below the table.
        missing: What was not measured.
        significant: The cells (row, column) with a star.
        best: The cells (row, column) in bold.
        corrected: The p-value of each tested cell (row, column), corrected for the number of the table's tests.
        records: The record of each row; None for a row that was not measured.
    """

    group: str
    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    significant: frozenset[tuple[int, int]] = frozenset()
    best: frozenset[tuple[int, int]] = frozenset()
    corrected: Mapping[tuple[int, int], float] = field(default_factory=dict)
    records: tuple[Record | None, ...] = ()

    @property
    def label(self) -> str:
        return f"tab:{self.group}-{self.name}"

    def header(self) -> list[str]:
        """Return the column names in CSV.

        An estimate has a value, `_low` and `_high`. A difference also has a p-value `_p` and the corrected `_p_holm`.
        """
        return [c.key + end for c in self.columns for end in c.ends]

    def flat(self) -> list[list[Decimal | float | int | str | None]]:
        """Return the rows for `header()` at full precision. An empty cell is None."""
        return [
            [
                value
                for c, (column, cell) in enumerate(zip(self.columns, row, strict=True))
                for value in _flat(column, cell, self.corrected.get((r, c)))
            ]
            for r, row in enumerate(self.rows)
        ]


def _flat(column: Column, cell: Cell, corrected: float | None) -> tuple[Any, ...]:
    if not isinstance(cell, RecordedEstimate):
        return (cell, *[None] * (len(column.ends) - 1))
    values = {
        "": cell.value,
        "_low": cell.low,
        "_high": cell.high,
        "_p": cell.p_value,
        "_p_holm": corrected,
        "_note": cell.note,
    }
    return tuple(values[end] for end in column.ends)
