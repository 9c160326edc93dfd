"""Print records, as tables or as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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


def show(records: list[Any], out: Path, as_json: bool, what: str = "Records are in") -> None:
    """Print the tables of records, or the records as JSON. Only the main process prints."""
    from ddil_eval.report import tables

    if not ranks.is_main():
        return
    if as_json:
        options.emit([record.model_dump(mode="json") for record in records])
        return
    show_tables(tables.build(records))
    click.echo(f"{what} {out}; tables with: ddil report --results {out} --csv --latex")
