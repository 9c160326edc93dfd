"""Print records, as tables or as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.support import ranks
from ddil_eval.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from ddil_eval.report.table_type import Table

FILE_WIDTH = 120
"""The width of tables in a file or a pipe. The environment variable COLUMNS sets another."""


def table_console() -> Console:
    """Return a console on stdout with the width for tables."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    return console


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables to stdout."""
    from ddil_eval.report.terminal import to_rich

    console = table_console()
    for table in tables:
        console.print(to_rich(table))


def write_tables(built: Sequence[Table], out: Path, as_csv: bool, as_latex: bool) -> list[Path]:
    """Write tables below a folder, as CSV and as LaTeX if asked, and return the files."""
    from ddil_core.support.files import write_text
    from ddil_eval.report import rendering as render

    formats = [(as_csv, ".csv", render.to_csv), (as_latex, ".tex", render.to_latex)]
    files = []
    for table in built:
        for _, suffix, text in (row for row in formats if row[0]):
            path = out / table.group / f"{table.name}{suffix}"
            write_text(path, text(table))
            files.append(path)
    return files


def show(records: list[Any], out: Path, as_json: bool, what: str = "Records are in") -> None:
    """Print the tables of records, or the records as JSON. Only the main process prints."""
    from ddil_eval.report import tables

    if not ranks.is_main():
        return
    if as_json:
        options.emit([record.model_dump(mode="json") for record in records])
        return
    show_tables(tables.build(records))
    options.say(f"{what} {out}; tables with: ddil report --results {out} --csv --latex")
