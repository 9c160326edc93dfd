"""What records say about one student, as Markdown for its model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ddil_core.export.card import Measured
from ddil_core.support.text import printable
from ddil_eval.report.records import Record, latest_records
from ddil_eval.report.rendering import header_text, marks_after, notes_below, printed_cells
from ddil_eval.report.table_type import Table
from ddil_eval.report.tables import build


def measured_of(records: Sequence[Record], student_sha256: str, teacher_sha256: str | None) -> Measured:
    """Return what records measured of a student and, in the same setting, of its teacher.

    Args:
        records: The records of a results folder.
        student_sha256: The hash of the student's weights. A record of other weights is another student's.
        teacher_sha256: The hash of the teacher's weights; None if it is not known.
    """
    kept = latest_records(records)[0]
    of_student = [record for record in kept if student_sha256 in _weights(record)]
    known = {student_sha256, teacher_sha256} - {None}
    alone = [record for record in kept if record.kind == "system" and _weights(record) and _weights(record) <= known]
    tables = [
        replace(table, missing=())  # the other systems of the protocol belong to no card
        for table in build(alone)
        if any(record is not None and student_sha256 in _weights(record) for record in table.records)
    ]
    shown = {id(record) for table in tables for record in table.records}
    return Measured(tuple(to_markdown(table) for table in tables), sum(id(r) not in shown for r in of_student))


def _weights(record: Record) -> set[str | None]:
    return {model.weights_sha256 for model in record.systems.values()}


def to_markdown(table: Table) -> str:
    """Return a table in Markdown, with the sentences below it. Rows that were not measured are left out."""
    rows = [
        [f"{' '.join(lines)}{marks_after(table, r, c)}" for c, lines in enumerate(cells)]
        for r, cells in enumerate(printed_cells(table))
        if table.records[r] is not None
    ]
    lines = [
        _text(table.caption),
        "",
        _line(header_text(column) for column in table.columns),
        _line("---" for _ in table.columns),
        *(_line(row) for row in rows),
        *(part for note in notes_below(table) for part in ("", _text(note))),
    ]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_text(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _text(text: str) -> str:
    """Return text on one line, in which no HTML begins."""
    return printable(text).replace("\n", " ").replace("<", "&lt;")
