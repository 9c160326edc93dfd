"""What is missing from a results folder, and the command that measures it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddil_eval.report.table_type import Table
from ddil_eval.report.tables import Group


@dataclass(frozen=True)
class Gap:
    """Something that is missing: what it is, the details, and the commands that make it."""

    what: str
    details: tuple[str, ...]
    commands: tuple[str, ...]


_AGAIN = "ddil eval run PROTOCOL.yaml"
"""The command that measures a group again. Finished work is not repeated."""
_PROTOCOL = "PROTOCOL.yaml is the file that made the records. Their protocol is shown at the end of the page."
_EXPERIMENTS = {
    "systems": ("systems side by side", "ddil eval systems --model REF --data REF"),
    "covariate-shift": (
        "the covariate-shift analysis",
        "ddil eval covariate-shift --teacher {teacher} --student {student}",
    ),
    "drift": ("the drift by transition", "ddil eval drift --teacher {teacher} --student {student}"),
    "prompt-inversion": ("the prompt inversion", "ddil eval run protocols/shapes/table5.yaml"),
}
"""What each experiment measures, and its command."""


def gaps(groups: Sequence[Group], tables: Sequence[Table], results: Path, pictures: Mapping[str, bool]) -> list[Gap]:
    """Return what is missing: cells, experiments without a record, and pictures.

    Args:
        groups: The groups of records.
        tables: Their tables.
        results: The results folder, as the user wrote it.
        pictures: For each kind of picture, "strips" and "images", whether the folder holds any.
    """
    found = [_cells(group, [table for table in tables if table.group == group.name], results) for group in groups]
    measured = {group.experiment for group in groups}
    roles = _roles(groups)
    for name, (what, command) in _EXPERIMENTS.items():
        if name not in measured:
            found.append(Gap(f"No record of {what}.", (), (_out(command.format(**roles), results),)))
    if not pictures["strips"] and measured & {"covariate-shift", "prompt-inversion"}:
        found.append(
            Gap(
                "No images of single prompts from the covariate-shift analysis or the prompt inversion, "
                "which keep them in folders named strips.",
                ("Results of earlier versions hold whole figures alone. These commands keep the images.", _PROTOCOL),
                (_out(_AGAIN, results),),
            )
        )
    drawn = [g for g in groups if g.experiment == "systems" and g.records[0].protocol.get("experiment") != "score"]
    if not pictures["images"] and drawn:
        found.append(
            Gap(
                "No images of the systems side by side, and no worst or most changed prompts.",
                (_PROTOCOL,),
                (f"{_out(_AGAIN, results)} --save-images",),
            )
        )
    return [gap for gap in found if gap is not None]


def _cells(group: Group, tables: Sequence[Table], results: Path) -> Gap | None:
    details = [f"{table.title}: {missing}" for table in tables for missing in table.missing]
    if not details:
        return None
    rows = {missing.removesuffix(": no record") for table in tables for missing in table.missing}
    provided = [
        str(row["provide"])
        for row in _rows(group.records[0].protocol.get("systems"))
        if row.get("provide") and row.get("name") in rows
    ]
    return Gap(f"Cells without a record in {group.name}.", (*details, *provided, _PROTOCOL), (_out(_AGAIN, results),))


def _roles(groups: Sequence[Group]) -> dict[str, str]:
    """Return the teacher and the student of the first analysis that names both."""
    for group in groups:
        systems = group.records[0].systems
        if {"teacher", "student"} <= systems.keys():
            return {role: shlex.quote(systems[role].reference) for role in ("teacher", "student")}
    return {"teacher": "REF", "student": "REF"}


def _rows(value: object) -> list[dict[str, object]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _out(command: str, results: Path) -> str:
    return f"{command} --out {shlex.quote(str(results))}"
