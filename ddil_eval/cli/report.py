"""``ddil report``: turn records into tables, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddil_eval.cli import options
from ddil_eval.cli.output import show_tables, write_tables

if TYPE_CHECKING:
    from ddil_eval.report.records import Record
    from ddil_eval.report.table_type import Table


@click.command()
@click.option("--results", type=options.INPUT, default=Path("results"), show_default=True, metavar="DIR",
              help="The folder with the records, at any depth.")  # fmt: skip
@click.option("--csv", "as_csv", is_flag=True, help="Write each table as CSV at full precision.")
@click.option(
    "--latex", "as_latex", is_flag=True, help="Write each table as LaTeX. It needs only the package booktabs."
)
@click.option("--html", "as_html", is_flag=True, help="Write one page with charts, tables, pictures and records.")
@click.option("--figures", is_flag=True, help="Draw systems, shift curves, effects and drift as PDF and PNG.")
@click.option(
    "--out", type=options.OUTPUT_FOLDER, metavar="DIR", help="The folder for files.  [default: RESULTS/report]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of tables.")
@click.option("--against", type=options.INPUT, default=None, metavar="DIR",
              help="Compare with the records of this folder, cell by cell.")  # fmt: skip
@click.option(
    "--fail-on-regression", is_flag=True, help="With --against, exit with status 1 if a value is significantly worse."
)
def report(
    results: Path, as_csv: bool, as_latex: bool, as_html: bool, figures: bool, out: Path | None, as_json: bool,
    against: Path | None, fail_on_regression: bool,
) -> None:  # fmt: skip
    """Make tables from records. Print them, or write them as CSV and LaTeX.

    The command names cells without a record, and counts older records that newer records replace. If a record is
    damaged, the command names it, makes the tables from the other records, and exits with status 1.

    With --against, each value stands beside the value of the same cell in another folder, with their difference.
    """
    from ddil_core.support.errors import DdilError, WrongCommand
    from ddil_eval.report import records as store
    from ddil_eval.report import tables

    if against is not None and (figures or as_html):
        raise WrongCommand("--against makes tables alone; leave out --figures and --html")
    if against is not None:
        from ddil_eval.cli.against import report_against

        return report_against(
            results, against, out or results / "report",
            as_csv=as_csv, as_latex=as_latex, as_json=as_json, fail_on_regression=fail_on_regression,
        )  # fmt: skip
    if fail_on_regression:
        raise WrongCommand("--fail-on-regression compares with other results; name them with --against DIR")
    records, damaged = store.sift(results)
    built = tables.build(records)
    if not built and damaged:
        raise store.together(damaged)
    if not built:
        what = "no records" if not records else "records, but none for a table,"
        raise DdilError(f"There are {what} in {results}: run `ddil eval covariate-shift`, or name another --results.")
    out = out or results / "report"
    drawn = _draw(records, built, out) if figures else []
    files = write_tables(built, out, as_csv, as_latex) + drawn
    if as_html:
        files.append(_write_page(records, built, results, out))
    replaced = len(store.latest_records(records)[1])
    if as_json:
        options.emit(_document(built, files, len(records), replaced))
    else:
        show_tables(built)
    _summarize(built, files, replaced)
    if figures and not drawn:
        options.say(
            f"No figure: --figures draws systems with their NFE, covariate shift and drift, and {results} has none.",
            err=True,
        )
    if damaged:
        raise store.together(damaged)


def _write_page(records: Sequence[Record], built: Sequence[Table], results: Path, out: Path) -> Path:
    from ddil_eval.report.page.write import write_page

    return write_page(records, built, results, out / "index.html")


def _draw(records: Sequence[Record], built: Sequence[Table], out: Path) -> list[Path]:
    from ddil_eval.report import paper_figures, tables

    return paper_figures.draw_all(tables.groups(records), built, out)


def _document(built: Sequence[Table], files: Sequence[Path], records: int, replaced: int) -> dict[str, Any]:
    from ddil_eval.report import rendering as render

    return {
        "records": records,
        "replaced": replaced,
        "tables": [render.to_dict(table) for table in built],
        "files": [str(path) for path in files],
    }


def _summarize(built: Sequence[Table], files: Sequence[Path], replaced: int) -> None:
    missing = sum(len(table.missing) for table in built)
    if missing:
        options.say(f"Cells that were not measured, named below their tables: {missing}.", err=True)
    if replaced:
        options.say(f"Older records that newer records replace, not shown: {replaced}.", err=True)
    for path in files:
        options.say(f"wrote {path}", err=True)
