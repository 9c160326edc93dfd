"""The record of a unit: one JSON file with its measures and with all that they depend on."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddil_core.support.checksums import with_content_sha256, without_content_sha256
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.outside import DESCRIPTION, newer, parse_json, read_file
from ddil_core.support.provenance import commit, versions
from ddil_eval.study.matrix import Unit

SCHEMA_VERSION = 1
"""The version of the format of a unit's record."""


class UnitRecord(BaseModel):
    """What was measured of a unit.

    Attributes:
        schema_version: The version of the format.
        unit: The unit in words.
        key: The hash of all that the numbers depend on.
        seed: The seed.
        config: The configuration of the distillation, within the study's budget.
        study: The teacher, the data, and what is measured.
        teacher_sha256: The hash of the teacher's weights.
        teacher_nfe: The evaluations of the teachers of all stages; None where nobody counts them.
        students: The measures of each student, by the number of its steps.
        seconds: How long distillation and measurement took in the process that finished the unit.
        versions: The versions of the packages.
        commit: The commit of the code.
        created: An ISO time with a zone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    unit: str
    key: str
    seed: int
    config: dict[str, Any]
    study: dict[str, Any]
    teacher_sha256: str | None
    teacher_nfe: int | None
    students: dict[int, dict[str, float]] = Field(min_length=1)
    seconds: float
    versions: dict[str, Any]
    commit: Any
    created: str


def record_path(out: Path, unit: Unit) -> Path:
    """Return the file of a unit's record."""
    return out / "units" / f"{unit.name}.json"


def save_unit(
    out: Path,
    unit: Unit,
    config: dict[str, Any],
    teacher: str | None,
    nfe: int | None,
    students: dict[int, dict[str, float]],
    seconds: float,
) -> None:
    """Write a unit's record. For the arguments see ``UnitRecord``.

    Raises:
        DdilError: a measure is not finite, or the disk does not take the file.
    """
    try:
        record = UnitRecord(
            unit=unit.words(),
            key=unit.key,
            seed=unit.seed,
            config=config,
            study=dict(unit.study),
            teacher_sha256=teacher,
            teacher_nfe=nfe,
            students=students,
            seconds=round(seconds, 2),
            versions=versions(),
            commit=commit(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    except ValidationError as error:
        broken = ", ".join(".".join(map(str, part["loc"])) for part in error.errors())
        raise DdilError(f"a measure is not finite ({broken}); lower the learning rate of this condition") from error
    content = with_content_sha256(record.model_dump(mode="json"))
    write_text(record_path(out, unit), json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_unit(out: Path, unit: Unit) -> UnitRecord | None:
    """Return the record of a unit, or None where there is none.

    Raises:
        DdilError: the record is damaged; the message says what to do.
    """
    path = record_path(out, unit)
    if not path.is_file():
        return None
    try:
        content = parse_json(read_file(path, DESCRIPTION))
        if (message := newer(f"the record {path}", content, SCHEMA_VERSION)) is not None:
            raise DdilError(message)
        record = UnitRecord.model_validate(without_content_sha256(content))
    except (ValueError, OSError) as error:
        raise DdilError(
            f"the record {path} is damaged; delete it, and the same command measures its unit again"
        ) from error
    if record.key != unit.key:
        raise DdilError(f"the record {path} belongs to another unit; delete it, and the same command measures it again")
    return record
