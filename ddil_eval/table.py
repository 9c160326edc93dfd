"""What a table is: columns, rows of cells, marks; made by ``tables`` from records, turned into text by ``render``."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from ddil_eval.store import Direction, Estimate

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05
"""What is marked as significant has a p-value below it."""

Cell = Estimate | Decimal | float | int | str | None
"""A paper's number is a Decimal, which keeps the digits as printed there; None is an empty cell."""


@dataclass(frozen=True)
class Column:
    """`key` is its CSV header, `header` what is printed; `source` says whose numbers these are.

    `tested` estimates are differences, which have a p-value. What a column `in_caption` says is in the caption too, so that
    LaTeX, which is short of space, leaves it out.
    """

    key: str
    header: str
    source: Literal["setting", "measured", "paper"] = "setting"
    direction: Direction | None = None
    interval: bool = False
    tested: bool = False
    in_caption: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """What its columns in CSV end in."""
        return ("", *(("_low", "_high") if self.interval else ()), *(("_p",) if self.tested else ()))


@dataclass(frozen=True)
class Table:
    """What a renderer needs; `group` names the setting that all rows share, `name` the table within it.

    `significant` and `best` are the cells (row, column) to be marked.
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

    @property
    def label(self) -> str:
        return f"tab:{self.group}-{self.name}"

    def header(self) -> list[str]:
        """Flat column names: an estimate gives its value, `_low` and `_high`, and a difference's `_p`."""
        return [c.key + end for c in self.columns for end in c.ends]

    def flat(self) -> list[list[Decimal | float | int | str | None]]:
        """Rows that match `header()`, at full precision; an empty cell is None."""
        return [
            [value for c, cell in zip(self.columns, row, strict=True) for value in _flat(c, cell)] for row in self.rows
        ]

    def frame(self) -> pd.DataFrame:
        """The table as a DataFrame, the paper's numbers as floats."""
        import pandas as pd

        rows = [[float(v) if isinstance(v, Decimal) else v for v in row] for row in self.flat()]
        return pd.DataFrame(rows, columns=self.header())


def significant(difference: Estimate) -> bool:
    """Whether a difference is one at `LEVEL`: by its p-value, or where it has none by its interval, which excludes 0."""
    if difference.p_value is not None:
        return difference.p_value < LEVEL
    return not difference.low <= 0 <= difference.high


def _flat(column: Column, cell: Cell) -> tuple[Any, ...]:
    if not isinstance(cell, Estimate):
        return (cell, *[None] * (len(column.ends) - 1))
    return (cell.value, cell.low, cell.high, cell.p_value)[: len(column.ends)]
