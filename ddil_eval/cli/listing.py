"""``ddil data``, ``ddil metrics``, and the table of ``ddil models``: what there is, what each needs, and whether it is here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ddil_eval.metrics import Metric

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of the table.")


def show(title: str, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Print ``rows`` as a table on stdout, one column for each key in ``columns``; True reads yes, False no, None –."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_word(row[column])) for column in columns))
    Console().print(table)


def _word(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def show_list(title: str, columns: Sequence[str], rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print ``rows``: as JSON, or as a table and then a line for each row that is not here, with what it needs."""
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    show(title, columns, rows)
    for row in rows:
        if not row["here"]:
            click.echo(f"{row['name']}: {row.get('missing') or row['needs']}")


@click.command()
@as_json
def data(as_json: bool) -> None:
    """List the data sets that --data accepts."""
    from ddil_core.data import listing

    show_list("Data sets", ("name", "description", "source", "here"), listing(), as_json)


@click.command()
@as_json
def metrics(as_json: bool) -> None:
    """List the metrics, which direction is better, and what each needs."""
    from ddil_eval.metrics import METRICS

    rows = [_metric_row(metric) for metric in METRICS.values()]
    show_list("Metrics", ("name", "title", "direction", "kind", "needs", "here"), rows, as_json)


def _metric_row(metric: Metric) -> dict[str, Any]:
    missing = metric.missing()
    row = {key: getattr(metric, key) for key in ("name", "title", "direction", "kind", "needs")}
    return {**row, "here": missing is None, "missing": missing}
