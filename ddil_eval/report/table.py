"""What a table is: columns, rows of cells, marks; made by ``tables`` from records, turned into text by ``render``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from ddil_eval.report.records import Direction, RecordedEstimate

DOUBT = "†"
"""Marks an estimate that is not to be trusted; a note below the table says why."""

Cell = RecordedEstimate | Decimal | float | int | str | None
"""A paper's number is a Decimal, which keeps the digits as printed there; None is an empty cell."""


@dataclass(frozen=True)
class Column:
    """`key` is its CSV header, `header` what is printed; `source` says whose numbers these are.

    `tested` estimates are differences, which have a p-value. `noted` ones hold an estimate that is not to be trusted. What a
    column `in_caption` says is in the caption too, so that LaTeX, which is short of space, leaves it out.
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
        """What its columns in CSV end in."""
        tests = ("_p", "_p_holm") if self.tested else ()
        return ("", *(("_low", "_high") if self.interval else ()), *tests, *(("_note",) if self.noted else ()))


@dataclass(frozen=True)
class Table:
    """What a renderer needs; `group` names the setting that all rows share, `name` the table within it.

    `significant` and `best` are the cells (row, column) to be marked; `corrected` holds the p-value, corrected for the number of
    the table's tests, of each that was tested.
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

    @property
    def label(self) -> str:
        return f"tab:{self.group}-{self.name}"

    def header(self) -> list[str]:
        """Flat column names: an estimate gives its value, `_low` and `_high`; a difference its `_p`, and `_p_holm`, which is
        corrected by Holm's method for the number of the table's tests."""
        return [c.key + end for c in self.columns for end in c.ends]

    def flat(self) -> list[list[Decimal | float | int | str | None]]:
        """Rows that match `header()`, at full precision; an empty cell is None."""
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
