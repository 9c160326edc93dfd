"""``ddil report``: records → tables on the terminal and in files. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddil_eval.cli import options
from ddil_eval.cli.output import show_tables

if TYPE_CHECKING:
    from ddil_eval.report.records import Record
    from ddil_eval.report.table import Table


@click.command()
@click.option("--results", type=options.INPUT, default=Path("results"), show_default=True, metavar="DIR",
              help="Folder with the records, at any depth.")  # fmt: skip
@click.option("--csv", "as_csv", is_flag=True, help="Write each table as CSV, at full precision.")
@click.option(
    "--latex", "as_latex", is_flag=True, help="Write each table as LaTeX; it needs the package booktabs alone."
)
@click.option("--figures", is_flag=True, help="Draw each metric over p_teacher and over switch_t.")
@click.option("--out", type=options.OUTPUT_FOLDER, metavar="DIR", help="Folder to write to.  [default: RESULTS/report]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of the tables.")
def report(results: Path, as_csv: bool, as_latex: bool, figures: bool, out: Path | None, as_json: bool) -> None:
    """Make the tables from the records: print them, and write them as CSV and LaTeX.

    Cells without a record stay empty and are named; older records that newer ones replace are reported. A damaged record is
    named, with exit status 1, and the tables are made of the others.
    """
    from ddil_core.support.errors import DdilError
    from ddil_eval.report import records as store
    from ddil_eval.report import tables

    records, damaged = store.sift(results)
    made = tables.build(records)
    if not made and damaged:
        raise store.together(damaged)
    if not made:
        what = "no records" if not records else "records, but none that a table is made of"
        raise DdilError(f"There are {what} in {results}: run `ddil eval covariate-shift`, or name another --results.")
    out = out or results / "report"
    files = _write(made, out, as_csv, as_latex) + (_draw(records, out) if figures else [])
    replaced = len(store.latest_records(records)[1])
    if as_json:
        options.emit(_document(made, files, len(records), replaced))
    else:
        show_tables(made)
    _say(made, files, replaced)
    if damaged:
        raise store.together(damaged)


def _write(made: Sequence[Table], out: Path, as_csv: bool, as_latex: bool) -> list[Path]:
    from ddil_core.support.files import write_text
    from ddil_eval.report import rendering as render

    wanted = [(as_csv, ".csv", render.to_csv), (as_latex, ".tex", render.to_latex)]
    files = []
    for table in made:
        for _, suffix, text in (row for row in wanted if row[0]):
            path = out / table.group / f"{table.name}{suffix}"
            write_text(path, text(table))
            files.append(path)
    return files


def _draw(records: Sequence[Record], out: Path) -> list[Path]:
    from ddil_eval.report import figures, tables

    shifts = [group for group in tables.groups(records) if group.experiment == "covariate-shift"]
    shown = [group for group in shifts if any(one.kind in figures.DRAWN and one.metrics for one in group.records)]
    return [figures.shift_curves(group.records, out / group.name / "shift.png") for group in shown]


def _document(made: Sequence[Table], files: Sequence[Path], records: int, replaced: int) -> dict[str, Any]:
    from ddil_eval.report import rendering as render

    whole = {
        "records": records,
        "replaced": replaced,
        "tables": [render.to_dict(table) for table in made],
        "files": [str(path) for path in files],
    }
    return whole


def _say(made: Sequence[Table], files: Sequence[Path], replaced: int) -> None:
    missing = sum(len(table.missing) for table in made)
    if missing:
        click.echo(f"Not measured, each named below its table: {missing}.", err=True)
    if replaced:
        click.echo(f"Older records of a newer measurement, kept and not shown: {replaced}.", err=True)
    for path in files:
        click.echo(f"wrote {path}", err=True)
