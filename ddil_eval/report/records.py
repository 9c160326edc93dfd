"""Records of measurements: one JSON file for each cell. A file is written whole or not at all, and never changed.

A record contains everything that its numbers depend on. Tables therefore need only records, and no torch. The file also
holds the SHA-256 of the record (``content_sha256``), which is checked where it is there.
The files lie in `records/` folders below a results folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ddil_core.support.checksums import CONTENT, require_content_sha256, with_content_sha256
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.outside import MEGABYTE, NotPlain, newer, parse_json, read_file
from ddil_core.support.size import pixels
from ddil_eval.report.cells import misfit

Direction = Literal["higher", "lower"]

SETTING = (
    "experiment",
    "protocol_hash",
    "systems",
    "data",
    "recipe",
    "solver",
    "grid",
    "guidance_scale",
    "reflection",
    "compute",
    "size",
    "seeds",
    "n_asked",
)
"""The fields that a cell's numbers depend on. Records with the same cell and the same fields measure the same thing."""

SCHEMA_VERSION = 1
"""The version of the layout of a record. Raise it where an older version cannot read a new record."""

LARGEST = 4 * MEGABYTE
"""The largest file of a record."""

_NUMBERS = ("metrics", "nfe", "n_done")

_FIRST_NAMES = {"systems": "compare"}
"""Renamed experiments, with the first name. File names and identity hashes keep the first name; both are read."""


class _Strict(BaseModel):
    # from_attributes: pydantic reads the estimates of `statistics` directly
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, from_attributes=True)


class RecordedEstimate(_Strict):
    """A value with its 95 % interval.

    Attributes:
        value: The value.
        low: The lower end of the interval, at most `value`.
        high: The upper end, at least `value`.
        n: The number of samples (of prompts, for a mean over prompts).
        p_value: The two-sided p-value of a difference; None for a single value.
        note: Why the value is not reliable; None if it is.
        degrees: The interval's degrees of freedom, where it is over training seeds and prompts. Else None, and left out
            of the file.
    """

    value: float
    low: float
    high: float
    n: int = Field(ge=0)
    p_value: float | None = Field(default=None, ge=0, le=1)
    note: str | None = None
    degrees: float | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _without_absent_degrees(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if self.degrees is None:
            content.pop("degrees", None)
        return content

    @model_validator(mode="after")
    def _contains_its_point(self) -> RecordedEstimate:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not contain its value {self.value}")
        return self


class RecordedMetric(_Strict):
    """The estimate of one metric.

    Attributes:
        estimate: The estimate.
        direction: Which values are better.
        kind: How features become a value (see `metrics.metric`).
        network: What the features depend on: a name, a version and the SHA-256 of each file of weights.
    """

    estimate: RecordedEstimate
    direction: Direction
    kind: Literal["mean", "set", "alone", "group"]
    network: dict[str, JsonValue] | None = None


class RecordedModel(_Strict):
    """A model of a measurement: the user's reference, and the SHA-256 of the weights."""

    reference: str
    weights_sha256: str | None


class RecordedCompute(_Strict):
    """How the models of a measurement computed (see `ddil_core.support.compute`)."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = False
    compile: bool = False
    deterministic: bool = False

    def words(self) -> str:
        """Return the settings that are no defaults, in words."""
        chosen = {f"computed in {self.dtype}": self.dtype != "fp32", "TF32": self.tf32, "compiled": self.compile}
        chosen["deterministic"] = self.deterministic
        return ", ".join(word for word, holds in chosen.items() if holds)


_PLAIN = RecordedCompute().model_dump(mode="json", exclude={"deterministic"})


class Record(_Strict):
    """One measured cell, and everything that its numbers depend on.

    `cell` has a `kind` and the entries that place it in a table: {"kind": "p_teacher", "p_teacher": 0.8}, {"kind":
    "teacher_then_student" | "student_then_teacher", "switch_t": 749}, {"kind": "pure", "model": "teacher"},
    {"kind": "string", "string": "TTSS"}, {"kind": "effect", "transitions": [0, 2]},
    {"kind": "system", "name": "PD", "steps": 4, "paper": "PD", "training_seeds": 5} (`paper` names the row
    of the paper's Table 1 or 5, `training_seeds` the number of students whose mean it is), {"kind": "difference",
    "name": "PD + DDIL − PD", "of": ["PD + DDIL", "PD"]},
    {"kind": "inverter", "name": "ph2p"} and
    {"kind": "inverter-difference", "name": "ph2p − random", "of": ["ph2p", "random"]}. The kind "pair" is a
    difference that the protocol does not name; a table needs it to mark the best system.

    `pictures_sha256` is the hash of the image files, if the images came from a folder. `nfe` is the mean number of
    network evaluations for each sample. `size` is the height and width in pixels of the images that the models drew;
    it is None where that is each model's own size. `compute` is None in records from before it was a setting, which
    have its defaults, and where no model drew. `created` is an ISO time with a zone.
    """

    schema_version: Literal[1] = 1
    experiment: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    cell: dict[str, JsonValue]
    protocol: dict[str, JsonValue]
    protocol_hash: str
    systems: dict[str, RecordedModel]
    data: dict[str, JsonValue]
    recipe: str
    solver: str
    grid: list[int | float]
    guidance_scale: float | None
    reflection: JsonValue
    compute: RecordedCompute | None = None
    size: tuple[int, int] | None = None
    pictures_sha256: str | None = None
    nfe: float | None
    seeds: list[int]
    n_asked: int = Field(ge=0)
    n_done: int = Field(ge=0)
    metrics: dict[str, RecordedMetric]
    wall_time_s: float = Field(ge=0)
    device: str
    versions: dict[str, str]
    commit: str | None
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat())

    @field_validator("experiment", mode="before")
    @classmethod
    def _has_its_present_name(cls, experiment: object) -> object:
        return next((name for name, first in _FIRST_NAMES.items() if first == experiment), experiment)

    @field_validator("cell")
    @classmethod
    def _has_a_kind(cls, cell: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if not isinstance(cell.get("kind"), str):
            raise ValueError("a cell needs a kind, a word")
        if (problem := misfit(cell)) is not None:
            raise ValueError(problem)
        return cell

    @field_validator("created")
    @classmethod
    def _has_a_zone(cls, created: str) -> str:
        if datetime.fromisoformat(created).tzinfo is None:
            raise ValueError("the time needs the ISO format and a zone")
        return created

    @property
    def kind(self) -> str:
        return str(self.cell["kind"])

    def identity(self) -> str:
        """Return the SHA-256 of the cell and its setting. Numbers, machine and time do not count."""
        return self.digest_of({"cell", *SETTING})

    def digest_of(self, fields: Collection[str]) -> str:
        """Return the SHA-256 of some fields, with the first name of the experiment, so that old hashes stay valid."""
        content = self.model_dump(mode="json", include=set(fields))
        compute = content.pop("compute", None) or {}
        compute.pop("deterministic", None)  # it changes the rounding alone
        if compute not in ({}, _PLAIN):
            content["compute"] = compute
        if self.size is None:
            content.pop("size", None)
        if "experiment" in content:
            content["experiment"] = self.first_name
        return digest(content)

    @property
    def first_name(self) -> str:
        """The first name of the experiment, which file names and hashes hold."""
        return _FIRST_NAMES.get(self.experiment, self.experiment)

    def numbers(self) -> dict[str, Any]:
        """Return the measured numbers."""
        return self.model_dump(mode="json", include=set(_NUMBERS))

    def age_key(self) -> datetime:
        """Return a key that sorts records of one identity, the oldest first."""
        return datetime.fromisoformat(self.created)


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value. The order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def save_record(record: Record, folder: Path | str) -> Path:
    """Save a record in `folder/records/` and return its file. A record with the same numbers is saved once.

    A second result of the same measurement with other numbers gets a number at the end of its file name.

    Raises:
        DdilError: The file cannot be written, or a file of that name is damaged.
    """
    stem = f"{record.first_name}-{_slug(record.cell)}-{record.identity()[:12]}"
    number = 1
    while True:
        path = Path(folder) / "records" / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            content = with_content_sha256(record.model_dump(mode="json"))
            write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            return path
        if _read(path).numbers() == record.numbers():
            return path
        number += 1


def read_records(folder: Path | str) -> list[Record]:
    """Return all records in `records/` folders at or below `folder`, in the order of their file names.

    Raises:
        DdilError: A record is damaged. The message names the files.
    """
    records, damaged = sift(folder)
    if damaged:
        raise together(damaged)
    return records


def together(damaged: Sequence[DdilError]) -> DdilError:
    """Return one error for several damaged records. It names the first three and counts the others."""
    named = "; ".join(map(str, damaged[:3]))
    return DdilError(named if len(damaged) <= 3 else f"{named}; and {len(damaged) - 3} more are damaged")


def sift(folder: Path | str) -> tuple[list[Record], list[DdilError]]:
    """Return the sound records at or below a folder, and an error for each damaged record.

    Raises:
        DdilError: A folder cannot be read.
    """
    records, damaged = list[Record](), list[DdilError]()
    for path in sorted(_files(Path(folder).resolve())):
        try:
            records.append(_read(path))
        except DdilError as error:
            damaged.append(error)
    return records, damaged


def _files(root: Path) -> Iterator[Path]:
    """Yield the files of records at or below a folder. The folder need not exist."""

    def closed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DdilError(
                f"The folder {error.filename} could not be read ({error.strerror}): make it readable."
            ) from error

    for folder, _, names in os.walk(root, onerror=closed):
        if "records" in Path(folder).relative_to(root.parent).parts:
            yield from (Path(folder, name) for name in names if name.endswith(".json") and not name.startswith("."))


def computed_words(records: Sequence[Record]) -> list[str]:
    """Return how models of a table computed, and at which size, if not by default: once, or by the rows' names."""
    words = {str(r.cell.get("name", r.kind)): _computed(r) for r in records}
    if len(set(words.values())) == 1:
        return [word for word in words.values() if word][:1]
    return [f"{name} {word}" for name, word in words.items() if word]


def _computed(record: Record) -> str:
    size = "" if record.size is None else f"images of {pixels(record.size)}"
    return ", ".join(word for word in ((record.compute or RecordedCompute()).words(), size) if word)


def latest_records(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Return the newest record of each measurement, and the older records, both in the given order."""
    records = list(records)
    newest: dict[str, Record] = {}
    for record in records:
        held = newest.get(record.identity())
        if held is None or record.age_key() >= held.age_key():
            newest[record.identity()] = record
    kept = {id(record) for record in newest.values()}
    return [r for r in records if id(r) in kept], [r for r in records if id(r) not in kept]


def _read(path: Path) -> Record:
    try:
        content = parse_json(read_file(path, LARGEST))
        if (message := newer(f"The record {path}", content, SCHEMA_VERSION)) is not None:
            raise DdilError(message)
        record = Record.model_validate(
            {key: value for key, value in content.items() if key != CONTENT} if isinstance(content, dict) else content
        )
        require_content_sha256(content)  # last, because the other reasons are more exact
        return record
    except NotPlain as error:
        raise _damaged(path, f"it {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        what = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        raise _damaged(path, f"{place}: {what}") from error
    except OSError as error:
        raise DdilError(f"The record {path} could not be read ({error.strerror}): make it readable.") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise _damaged(path, f"it is no JSON: {error}") from error


def _damaged(path: Path, why: str) -> DdilError:
    return DdilError(f"The record {path} is damaged ({why}): move it away and run its measurement again.")


def _slug(cell: dict[str, JsonValue]) -> str:
    values = [cell["kind"], *(cell[key] for key in sorted(cell) if key != "kind")]
    words = "-".join(str(value) for value in values)
    return re.sub(r"[^A-Za-z0-9._]+", "-", words).strip("-")[:80]
