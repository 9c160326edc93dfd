"""Records as a pandas DataFrame, for analysis in Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from ddil_core.support.errors import DdilError
from ddil_eval.report.records import Record, RecordedCompute, latest_records, read_records

if TYPE_CHECKING:
    import pandas as pd

Entry = str | float | int | tuple[object, ...] | None


def load_records(folder: Path | str, *, replaced: bool = False) -> pd.DataFrame:
    """Return the records at or below a results folder, one row for each measured cell.

    The columns, from left to right:

    - `experiment`, `kind`, and the other entries of the cell: `name`, `steps`, `p_teacher`, `switch_t`, `string`, …
    - The setting: `models` (a tuple of model references), `data`, `split`, `recipe`, `solver`, `guidance_scale`,
      `dtype`, `tf32`, `compile`, `size`, `seed`.
    - `n_asked` and `n_done`, the numbers of samples; `nfe`, the mean number of network evaluations for each sample.
    - For each metric: its value (`fid`), its 95 % interval (`fid_low`, `fid_high`), the p-value of a difference
      (`fid_p`), and a note that says why the value is not reliable (`fid_note`). These are the names of the CSV tables.
      `fid_p` and `fid_note` are left out where no record has them.
    - `identity`, the hash of what was measured and how; `protocol_hash`; `wall_time_s`; `device`; `commit`; `created`.

    A value that a record does not have is NaN or None. To keep only the columns that some rows use, write
    `rows.dropna(axis="columns", how="all")`.

    Args:
        folder: A results folder. Records are read from its `records/` folders at any depth.
        replaced: Return older records too, if a newer record of the same measurement exists.

    Raises:
        DdilError: The folder holds no records, or a record is damaged or cannot be read.

    Example:
        >>> from ddil_eval.report.frames import load_records
        >>> records = load_records("results/shapes")
        >>> systems = records[records["kind"] == "system"]
        >>> systems.sort_values("fd_efflite0")["name"].iloc[0]
        'teacher, 8 steps'
    """
    import pandas as pd

    records = read_records(folder)
    if not records:
        raise DdilError(f"There are no records in {folder}: name a results folder, or measure something first.")
    if not replaced:
        records, _ = latest_records(records)
    parts = [(_place(record), _setting(record), _numbers(record), _origin(record)) for record in records]
    columns = dict.fromkeys(name for part in zip(*parts, strict=True) for entries in part for name in entries)
    rows = [{name: value for entries in part for name, value in entries.items()} for part in parts]
    return pd.DataFrame(rows, columns=list(columns))


def _place(record: Record) -> dict[str, Entry]:
    """Return the experiment and the entries of the cell. Lists become tuples, which pandas can group."""
    entries = {"kind": record.kind, **record.cell}
    return {"experiment": record.experiment} | {name: _entry(value) for name, value in entries.items()}


def _entry(value: JsonValue) -> Entry:
    if isinstance(value, list):
        return tuple(value)
    return str(value) if isinstance(value, dict) else value


def _setting(record: Record) -> dict[str, Entry]:
    compute = record.compute or RecordedCompute()
    return {
        "models": tuple(model.reference for model in record.systems.values()),
        "data": _entry(record.data.get("reference")),
        "split": _entry(record.data.get("split")),
        "recipe": record.recipe,
        "solver": record.solver,
        "guidance_scale": record.guidance_scale,
        "dtype": compute.dtype,
        "tf32": compute.tf32,
        "compile": compute.compile,
        "size": record.size,
        "seed": record.seeds[0] if len(record.seeds) == 1 else tuple(record.seeds),
        "n_asked": record.n_asked,
        "n_done": record.n_done,
        "nfe": record.nfe,
    }


def _numbers(record: Record) -> dict[str, Entry]:
    numbers: dict[str, Entry] = {}
    for name, metric in record.metrics.items():
        estimate = metric.estimate
        numbers |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        if estimate.p_value is not None:
            numbers[f"{name}_p"] = estimate.p_value
        if estimate.note is not None:
            numbers[f"{name}_note"] = estimate.note
    return numbers


def _origin(record: Record) -> dict[str, Entry]:
    return {
        "identity": record.identity(),
        "protocol_hash": record.protocol_hash,
        "wall_time_s": record.wall_time_s,
        "device": record.device,
        "commit": record.commit,
        "created": record.created,
    }
