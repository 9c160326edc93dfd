"""Print records, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddil_core.support import ranks
from ddil_eval.cli import options

if TYPE_CHECKING:
    from ddil_eval.report.table_type import Table


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables to stdout."""
    from rich.console import Console

    from ddil_eval.report import rendering as render

    console = Console()
    if not console.is_terminal:
        console.width = 140  # a file has no width, and rich's default of 80 columns would break the tables
    for table in tables:
        console.print(render.to_rich(table))


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
