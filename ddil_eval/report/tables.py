"""Records → tables: the covariate-shift analysis (the paper's Tables 2, 3, 4) and comparisons of systems.

``rendering`` turns a table into CSV, LaTeX, JSON and text. Records of different settings (protocol, systems, data,
recipe, …) go to different tables. A cell without a record stays empty, and `missing` names it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import PurePath
from typing import Any

from ddil_eval.report.cells import DRIFT_GROUP_KINDS
from ddil_eval.report.comparisons import LEVEL, MARKED, best_and_p_value, corrected_p_values, holm
from ddil_eval.report.paper_numbers import paper_pairs, paper_rows
from ddil_eval.report.records import SETTING, Direction, Record, computed_words, latest_records
from ddil_eval.report.table_texts import (
    COMPARED,
    DIFFERENCES,
    DRIFT,
    EFFECTS,
    OF_FOLDERS,
    OVER_SEEDS,
    PAIRED_SEEDS,
    PAPER_TABLES,
)
from ddil_eval.report.table_type import DOUBT, Cell, Column, Table


@dataclass(frozen=True)
class Group:
    """The newest record of each cell of one experiment and one setting, in a stable order.

    Attributes:
        name: The name of the group, a folder name.
        experiment: The experiment.
        records: The records.
        replaced: How many older records they replace.
    """

    name: str
    experiment: str
    records: tuple[Record, ...]
    replaced: int

    def find(self, **cell: object) -> Record | None:
        """Return the record of the cell with these entries, or None."""
        return next((r for r in self.records if all(r.cell.get(key) == value for key, value in cell.items())), None)

    def of_kind(self, kind: str) -> list[Record]:
        return [r for r in self.records if r.kind == kind]


@dataclass(frozen=True)
class _Row:
    """A row before it becomes cells.

    Attributes:
        place: The cells that place the row.
        wanted: The name of the row among the missing cells.
        record: The record, or None.
        paper: The paper's numbers.
    """

    place: tuple[Cell, ...]
    wanted: str
    record: Record | None
    paper: tuple[Cell, ...] = ()


_OWN = {"systems", "solver", "grid", "guidance_scale", "reflection", "compute", "size"}
"""The fields in which the rows of a comparison may differ."""
_SHARED = {
    # The rows of a comparison are different systems with their own grids; columns name them.
    "systems": set(SETTING) - _OWN,
    "covariate-shift": set(SETTING),
    "drift": set(SETTING),
    "prompt-inversion": set(SETTING) - _OWN,
}
"""For each experiment with tables, in the order of the tables: the fields that all rows of one table share."""


def groups(records: Iterable[Record]) -> list[Group]:
    """Split records by experiment and by the setting that the rows of its tables share."""
    kept, replaced = latest_records(r for r in records if r.experiment in _SHARED)
    split: dict[str, list[Record]] = {}
    for record in kept:
        split.setdefault(_group_name(record), []).append(record)
    old = [_group_name(record) for record in replaced]
    order = list(_SHARED)
    grouped = [Group(name, rows[0].experiment, tuple(rows), old.count(name)) for name, rows in split.items()]
    # by the name without its hash, so that of the same students those with more steps come first
    return sorted(grouped, key=lambda g: (order.index(g.experiment), g.name[:-9], -len(g.records[0].grid), g.name))


def build(records: Iterable[Record]) -> list[Table]:
    """Return all tables of the records. Experiments without tables are left out."""
    makers: dict[str, Callable[[Group], list[Table]]] = {
        "covariate-shift": shift_tables,
        "drift": drift_tables,
        "systems": system_tables,
        "prompt-inversion": inversion_tables,
    }
    return [table for group in groups(records) for table in makers[group.experiment](group)]


def shift_tables(group: Group) -> list[Table]:
    """Return the pure runs and Tables 2, 3 and 4, and the factorial's three tables if any of it was measured."""
    tables = [_pure(group), *(_beside_paper(group, *table) for table in PAPER_TABLES)]
    transitions = _transitions(group)
    tables += _factorial(group, transitions) if transitions else []
    return [table for table in tables if table.rows]


def drift_tables(group: Group) -> list[Table]:
    """Return the tables of the drift experiment, by the time at which a transition starts."""
    tables = []
    for kind, title, text, tested in DRIFT:
        records = sorted(group.of_kind(kind), key=lambda r: (str(r.cell.get("name")), _falling_time(r)))
        grouped = [Column("group", "Group"), Column("training_seeds", "Seeds")] if kind in DRIFT_GROUP_KINDS else []
        rows = [_drift_row(record, bool(grouped)) for record in records]
        tables.append(_table(group, kind, title, text, [*grouped, Column("t", "t")], rows, tested=tested))
    return [table for table in tables if table.rows]


def _drift_row(record: Record, grouped: bool) -> _Row:
    t = record.cell["t"]
    time = t if isinstance(t, str | int | float) else None
    if not grouped:
        return _Row((time,), f"t = {t}", record)
    return _Row((_name(record), int(_number(record.cell["training_seeds"])), time), f"{_name(record)}, t = {t}", record)


def _falling_time(record: Record) -> float:
    """Return a key that sorts by falling time, with all transitions together last."""
    return 1.0 if record.cell["t"] == "all" else -_number(record.cell["t"])


def system_tables(group: Group) -> list[Table]:
    """Return the systems side by side, in the order of the newest protocol, and their paired differences, if any."""
    scored = group.records[0].protocol.get("experiment") == "score"  # its records have the experiment "systems"
    source, label, title, text, column, note = COMPARED["score" if scored else group.experiment]
    newest = max(group.records, key=lambda r: r.age_key()).protocol
    wanted = {str(row["name"]): row for row in _mappings(newest.get("systems"))}
    order = {name: place for place, name in enumerate(wanted)}
    systems = sorted(group.of_kind("system"), key=lambda r: (_name(r).casefold(), -_number(r.cell.get("steps"))))
    measured = {_name(r) for r in systems}
    numbers = paper_rows(source)
    rows = [_system_row(_name(r), r, r.cell, numbers) for r in systems]
    rows += [_system_row(name, None, row, numbers) for name, row in wanted.items() if name not in measured]
    rows.sort(key=lambda row: order.get(row.wanted, len(order)))
    columns = [Column(key.lower(), key) for key in ("System", "Steps", "Solver", "Guidance")]
    columns.append(Column("recipe", "Recipe", in_caption=True))
    paired = OF_FOLDERS if scored else DIFFERENCES
    if any("training_seeds" in record.cell for record in systems):
        paired = f"{paired} {PAIRED_SEEDS}"
        columns.insert(1, Column("training_seeds", "Seeds"))
        rows = [replace(row, place=(row.place[0], _training_seeds(row.record), *row.place[1:])) for row in rows]
        text = f"{text} {OVER_SEEDS}"
    beside = any(cell is not None for row in rows for cell in row.paper)
    paper = [column] if beside else []
    elsewhere = not str(group.records[0].data.get("reference")).startswith("coco")
    note += ". That is another world: compare directions, not values." if elsewhere else "."
    table = _table(group, label, title, text, columns, rows, paper=paper, notes=[note] if beside else [])
    tables = [replace(table, best=_best(group, table, rows))]
    tables.append(_named(group, "difference", "differences", "Differences", paired, "Difference", tested=True))
    return [table for table in tables if table.rows]


def inversion_tables(group: Group) -> list[Table]:
    """Return Table 5 and its differences, and the inverters side by side with their differences."""
    text = "Inverters on the same images: measures of the teacher's images from their prompts, and the caption recall."
    paired = "Paired differences between inverters on the same images."
    inverters = [
        _named(group, "inverter", "inverters", "Inverters", text, "Inverter"),
        _named(
            group,
            "inverter-difference",
            "inverter-differences",
            "Inverters, differences",
            paired,
            "Difference",
            tested=True,
        ),
    ]
    return system_tables(group) + [table for table in inverters if table.rows]


def _named(group: Group, kind: str, name: str, title: str, text: str, header: str, *, tested: bool = False) -> Table:
    """Return a table of the cells of one kind, in the order of their names."""
    rows = [_Row((_name(r),), _name(r), r) for r in sorted(group.of_kind(kind), key=_name)]
    return _table(group, name, title, text, [Column(header.lower(), header)], rows, tested=tested)


def _system_row(
    name: str, record: Record | None, cell: Mapping[str, Any], numbers: Mapping[tuple[str, int], Decimal]
) -> _Row:
    """Return the row of a system. Without a record, the row holds its entry of the protocol and the paper's number."""
    steps = int(_number(cell["steps"])) if cell.get("steps") else None
    paper = (numbers.get((str(cell.get("paper")), steps or 0)),)
    if record is None:
        return _Row((name, steps, None, None, None), name, None, paper)
    return _Row((name, steps, record.solver, _guidance(record), record.recipe), name, record, paper)


def _training_seeds(record: Record | None) -> Cell:
    seeds = None if record is None else record.cell.get("training_seeds")
    return None if seeds is None else int(_number(seeds))


def _best(group: Group, table: Table, rows: Sequence[_Row]) -> frozenset[tuple[int, int]]:
    """Return the best cell of each measured column, if significantly better than the second best.

    The columns are one family of tests.
    """
    p_values = {}
    for place, column in enumerate(table.columns):
        metric = column.key if column.source == "measured" else ""
        measured = [
            (i, row.wanted, row.record.metrics[metric])
            for i, row in enumerate(rows)
            if row.record and metric in row.record.metrics
        ]
        leader = best_and_p_value([(name, value) for _, name, value in measured], metric, group.records)
        if leader is not None:
            p_values[measured[leader[0]][0], place] = leader[1]
    return frozenset(cell for cell, corrected in holm(p_values).items() if corrected < LEVEL)


def _pure(group: Group) -> Table:
    rows = [_Row((m,), f"the pure {m}", group.find(kind="pure", model=m)) for m in ("teacher", "student")]
    text = "The teacher alone and the student alone, the two extremes of mixed rollouts."
    note = "The paper (SD 1.5 on COCO) reports an FID of about 22.5 for both and a CLIP score of 0.321 for its teacher."
    return _table(group, "pure", "Pure runs", text, [Column("model", "Model")], rows, notes=[note])


def _beside_paper(group: Group, name: str, kind: str, key: str, text: str) -> Table:
    """Return the paper's Table 2, 3 or 4: the paper's rows and other measured rows, by falling `key`."""
    paper = paper_pairs(name)
    values = sorted({*paper, *(_number(r.cell[key]) for r in group.of_kind(kind))}, reverse=True)
    rows = [
        _Row((_tidy(v),), f"{key} = {v:g}", group.find(kind=kind, **{key: v}), paper.get(v, (None, None)))
        for v in values
    ]
    columns = [Column("paper_fid", "FID", "paper", "lower"), Column("paper_clip", "CLIP", "paper", "higher")]
    note = "The paper's numbers are for SD 1.5 on COCO, which is another world: compare directions, not values."
    return _table(group, name, f"Table {name[-1]}", text, [Column(key, key)], rows, paper=columns, notes=[note])


def _factorial(group: Group, transitions: int) -> list[Table]:
    strings = ["".join(letters) for letters in itertools.product("TS", repeat=transitions)]
    rows = [_Row((s,), f"string {s}", group.find(kind="string", string=s)) for s in strings]
    text = "All teacher/student strings: who acts at each transition, T the teacher and S the student."
    tables = [_table(group, "strings", "Factorial", text, [Column("string", "String")], rows)]
    for size, name, title, text in EFFECTS:
        which = list(itertools.combinations(range(transitions), size))
        names = [" × ".join(_transition(group, i) for i in indices) for indices in which]
        effects = [group.find(kind="effect", transitions=list(indices)) for indices in which]
        rows = [_Row((n,), f"effect of {n}", r) for n, r in zip(names, effects, strict=True)]
        columns = [Column("transition", "Transition")]
        tables.append(_table(group, name, title, text, columns, rows, tested=True))
    return tables


def _table(
    group: Group, name: str, title: str, text: str, place: Sequence[Column], rows: Sequence[_Row], *,
    paper: Sequence[Column] = (), tested: bool = False, notes: Sequence[str] = (),
) -> Table:  # fmt: skip
    metrics = _metrics([row.record for row in rows if row.record] or group.records)
    has_nfe = any(row.record and row.record.nfe is not None for row in rows)
    doubts = {n: _doubts(rows, n) for n in metrics}
    columns = [
        *place,
        *(Column(n, n, "measured", d, interval=True, tested=tested, noted=bool(doubts[n])) for n, d in metrics.items()),
    ]
    columns += [Column("n", "N", "measured"), *([Column("nfe", "NFE", "measured")] if has_nfe else []), *paper]
    cells = [(*row.place, *_measured(row.record, list(metrics), has_nfe), *row.paper[: len(paper)]) for row in rows]
    corrected = corrected_p_values(cells) if tested else {}
    tests = "1 test" if len(corrected) == 1 else f"{len(corrected)} tests"
    marked = [MARKED.format(tests)] if corrected else []
    explained = dict.fromkeys(f"{DOUBT} {note}" for metric_notes in doubts.values() for note in metric_notes)
    return Table(
        group.name, name, title, " ".join([text, *marked, _setting(group)]), tuple(columns), tuple(cells),
        notes=(*notes, *explained, *_remarks(group, rows)), missing=tuple(_missing(rows, list(metrics))),
        significant=frozenset(cell for cell, p in corrected.items() if p < LEVEL), corrected=corrected,
        records=tuple(row.record for row in rows),
    )  # fmt: skip


def _doubts(rows: Sequence[_Row], metric: str) -> list[str]:
    """Return the notes on unreliable values of a metric."""
    notes = [row.record.metrics[metric].estimate.note for row in rows if row.record and metric in row.record.metrics]
    return [note for note in notes if note is not None]


def _measured(record: Record | None, metrics: Sequence[str], has_nfe: bool) -> list[Cell]:
    if record is None:
        return [None] * (len(metrics) + 1 + has_nfe)
    values: list[Cell] = [record.metrics[m].estimate if m in record.metrics else None for m in metrics]
    return [*values, record.n_done, *([record.nfe] if has_nfe else [])]


def _missing(rows: Sequence[_Row], metrics: Sequence[str]) -> list[str]:
    absent = [f"{row.wanted}: no record" for row in rows if row.record is None]
    present = [(row.wanted, row.record) for row in rows if row.record]
    return absent + [f"{name}: its record has no {m}" for name, r in present for m in metrics if m not in r.metrics]


def _remarks(group: Group, rows: Sequence[_Row]) -> list[str]:
    present = [(row.wanted, row.record) for row in rows if row.record]
    short = [f"{name} ({r.n_done} of {r.n_asked})" for name, r in present if r.n_done < r.n_asked]
    remarks = [f"Fewer samples than requested: {'; '.join(short)}."] if short else []
    if group.replaced:
        remarks.append(
            f"The table shows the newest records. Older records with other numbers, not shown: {group.replaced}."
        )
    return remarks


def _metrics(records: Iterable[Record]) -> dict[str, Direction]:
    return {name: metric.direction for record in records for name, metric in record.metrics.items()}


_ROLES = ("teacher", "student", "first", "second")
"""What the systems of an analysis are, in the order in which captions name them."""


def _place(role: str) -> int:
    return _ROLES.index(role) if role in _ROLES else len(_ROLES)


def _setting(group: Group) -> str:
    """Return the setting that all rows share, as a sentence."""
    first = group.records[0]
    paired = group.experiment in ("covariate-shift", "drift")
    systems = first.systems.items() if paired else ()
    data = " ".join(str(first.data[key]) for key in ("reference", "split") if key in first.data)
    parts = [f"{role} {system.reference}" for role, system in sorted(systems, key=lambda item: _place(item[0]))]
    parts += [f"data {data}", f"recipe {first.recipe}"]
    if paired:
        parts += [f"solver {first.solver}", f"guidance {_guidance(first)}", f"reflection {_reflection(first)}"]
    parts += computed_words(group.records)
    parts += [f"seed {', '.join(map(str, first.seeds)) or 'unknown'}", f"N requested {first.n_asked}"]
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}; brackets contain 95% intervals."


def _transitions(group: Group) -> int:
    """Return the number of transitions of the factorial's records; 0 without such records."""
    lengths = [len(str(r.cell["string"])) for r in group.of_kind("string")]
    effects = [r.cell["transitions"] for r in group.of_kind("effect")]
    return max([0, *lengths, *(int(_number(i)) + 1 for e in effects if isinstance(e, list) for i in e)])


def _transition(group: Group, index: int) -> str:
    grid = [*group.records[0].grid, "clean"]
    return f"{grid[index]}→{grid[index + 1]}" if index + 1 < len(grid) else f"transition {index + 1}"


def _group_name(record: Record) -> str:
    """Return a folder name: the experiment, the student of an analysis, and a hash of what the rows share."""
    shared = record.digest_of(_SHARED[record.experiment])[:8]
    student = record.systems.get("student") if record.experiment in ("covariate-shift", "drift") else None
    words = [record.experiment, PurePath(student.reference).name if student else "", shared]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(word for word in words if word))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _tidy(value: float) -> float | int:
    return int(value) if value > 1 and value == int(value) else value


def _name(record: Record) -> str:
    return str(record.cell["name"])


def _mappings(value: object) -> list[Mapping[str, Any]]:
    """Return the named rows of a list in a protocol."""
    return [row for row in value if isinstance(row, dict) and "name" in row] if isinstance(value, list) else []


def _guidance(record: Record) -> str:
    if record.guidance_scale is None:
        return "unknown" if record.solver == "unknown" else "none"
    return f"{record.guidance_scale:g}"


def _reflection(record: Record) -> str:
    value = record.reflection
    return str(value.get("mode", "yes")) if isinstance(value, dict) else str(value or "none")
