"""``ddil report --against``: compare two results folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ddil_eval.cli import options
from ddil_eval.cli.output import show_tables, write_tables

if TYPE_CHECKING:
    from ddil_eval.report.against import Against
    from ddil_eval.report.records import Record
    from ddil_eval.report.table_type import Table


def report_against(
    new: Path, old: Path, out: Path, *, as_csv: bool, as_latex: bool, as_json: bool, fail_on_regression: bool
) -> None:
    """Compare two results folders, and print or write the tables.

    Args:
        new: The results folder.
        old: The results folder to compare with.
        out: The folder for files.
        as_csv: Whether to write each table as CSV.
        as_latex: Whether to write each table as LaTeX.
        as_json: Whether to print one JSON document in place of tables.
        fail_on_regression: Whether a significantly worse value is an error.

    Raises:
        WrongCommand: The folders are one, or one lies inside the other.
        DdilError: A folder has no records, nothing can be compared, a record is damaged, or a value is significantly
            worse and ``fail_on_regression`` is set.
    """
    from ddil_core.support.errors import DdilError
    from ddil_eval.report import records as store
    from ddil_eval.report.against_tables import against_tables, worst_sentence

    _require_apart(new, old)
    (records, damaged), (before, damaged_before) = store.sift(new), store.sift(old)
    for folder, held in ((new, records), (old, before)):
        if not held:
            raise (
                store.together([*damaged, *damaged_before])
                if damaged or damaged_before
                else DdilError(f"There are no records in {folder}: name a results folder of `ddil eval`.")
            )
    against = _compare(records, before, new, old)
    tables = against_tables(against)
    files = write_tables(tables, out, as_csv, as_latex)
    if as_json:
        options.emit(_document(against, tables, files, new, old))
    else:
        show_tables(tables)
    worst = worst_sentence(against)
    _say(against, files, as_json, None if fail_on_regression else worst)  # a failure says the worst, once
    if damaged or damaged_before:
        raise store.together([*damaged, *damaged_before])
    if not against.tests:
        raise DdilError(
            f"No value of {new} can be compared with one of {old}: measure the same cells with the same recipe, "
            "metrics and number of images."
        )
    if fail_on_regression and worst is not None:
        raise DdilError(f"{worst}.")


def _compare(records: Sequence[Record], before: Sequence[Record], new: Path, old: Path) -> Against:
    from ddil_eval.features.prompt_scores import PromptScores
    from ddil_eval.metrics import METRICS
    from ddil_eval.report.against import compare_results

    after_scores, before_scores = (PromptScores.below(folder).find for folder in (new, old))
    return compare_results(
        records, before, after_scores, before_scores, lambda metric: metric in METRICS and METRICS[metric].rate
    )


def _require_apart(new: Path, old: Path) -> None:
    """Refuse two folders that share records.

    Raises:
        WrongCommand: The folders are one, or one lies inside the other.
    """
    from ddil_core.support.errors import WrongCommand

    after, before = new.resolve(), old.resolve()
    if after == before:
        raise WrongCommand(f"--against names the folder of --results, {new}; name the results to compare with")
    if after in before.parents or before in after.parents:
        raise WrongCommand(
            f"of the folders {new} and {old} one lies inside the other, and its records would count on both sides; "
            "name two folders apart"
        )


def _document(
    against: Against, tables: Sequence[Table], files: Sequence[Path], new: Path, old: Path
) -> dict[str, object]:
    from ddil_eval.report import rendering as render
    from ddil_eval.report.against_tables import summary

    places = {"new": str(new), "old": str(old)}
    return places | summary(against) | {
        "tables": [render.to_dict(table) for table in tables],
        "files": [str(path) for path in files],
    }  # fmt: skip


def _say(against: Against, files: Sequence[Path], as_json: bool, worst: str | None) -> None:
    """Print the counts of results and the sentence on the worst to stdout, and what was not compared to stderr."""
    from ddil_eval.report.against import Result
    from ddil_eval.report.against_tables import cell_names

    if not as_json:
        counts = ", ".join(f"{len(against.of(result))} {result}" for result in get_args(Result))
        options.say(f"Values in both: {counts}.")
        if worst is not None:
            options.say(f"The worst: {worst}.")
    for side, records in (("new", against.only_new), ("old", against.only_old)):
        if records:
            options.say(f"Cells in the {side} results only: {'; '.join(cell_names(records))}.", err=True)
    if against.metrics_apart:
        options.say(f"Metrics in one record only: {'; '.join(against.metrics_apart)}.", err=True)
    if against.left_out:
        options.say(f"Differences and spreads, left out since their cells are compared: {against.left_out}.", err=True)
    for path in files:
        options.say(f"wrote {path}", err=True)
