"""Records → tables: the covariate-shift analysis (the paper's Tables 2, 3, 4) and comparisons of systems.

A table is data; `rendering` turns it into CSV, LaTeX, JSON and text. Records of different settings (protocol, systems,
data, recipe, …) go to different tables. A cell without a record stays empty and is named in `missing`.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import PurePath
from typing import Any

from ddil_core.support.resources import paper_results
from ddil_eval.report.comparisons import BOLD, LEVEL, MARKED, best_and_p_value, corrected_p_values, holm
from ddil_eval.report.records import SETTING, Direction, Record, latest_records
from ddil_eval.report.table import DOUBT, Cell, Column, Table


@dataclass(frozen=True)
class Group:
    """Records of one experiment that share a setting, the newest of each cell, in a stable order."""

    name: str
    experiment: str
    records: tuple[Record, ...]
    replaced: int

    def find(self, **cell: object) -> Record | None:
        """The record of the cell with these entries."""
        return next((r for r in self.records if all(r.cell.get(key) == value for key, value in cell.items())), None)

    def of_kind(self, kind: str) -> list[Record]:
        return [r for r in self.records if r.kind == kind]


@dataclass(frozen=True)
class _Row:
    """A row to be: what places it, its record if there is one, the paper's numbers, and its name among the missing."""

    place: tuple[Cell, ...]
    wanted: str
    record: Record | None
    paper: tuple[Cell, ...] = ()


_SHARED = {
    "covariate-shift": set(SETTING),
    # Each row of a comparison is another system on its own grid; the columns say which.
    "systems": set(SETTING) - {"systems", "solver", "grid", "guidance_scale", "reflection"},
    "prompt-inversion": set(SETTING) - {"systems", "solver", "grid", "guidance_scale", "reflection"},
}
"""For each experiment that has tables, what the rows of one table must agree on."""


_SYSTEMS = f"Systems on the same prompts and seeds. {BOLD}"
_DIFFERENCES = "Paired differences between systems on the same prompts and seeds."

_COMPARED = {
    "systems": (
        "table1", "systems", "Systems", _SYSTEMS, Column("paper_fid", "FID", "paper", "lower"),
        "The paper's FID is of SD 1.5 on COCO 2014, prepared as it does not print",
    ),
    "prompt-inversion": (
        "table5", "table5", "Table 5", f"Each system draws from prompts inverted on the teacher. {BOLD}",
        Column("paper_lpips_div", "LPIPS_Div", "paper", "higher"),
        "The paper's LPIPS_Div is of SD 1.5 on pictures that it does not name",
    ),
}  # fmt: skip
"""For each experiment that compares systems: the paper's table, ours, its caption, the paper's column and a note on it."""

_PAPER_TABLES = (
    (
        "table2",
        "p_teacher",
        "p_teacher",
        "At each transition the teacher acts with probability p_teacher, else the student.",
    ),
    ("table3", "teacher_then_student", "switch_t", "The teacher acts until t = switch_t, then the student."),
    ("table4", "student_then_teacher", "switch_t", "The student acts until t = switch_t, then the teacher."),
)
"""Name, kind of cell, the number that orders the rows, and what is measured [paper, Tables 2-4]."""


_EFFECTS = (
    (
        1,
        "main-effects",
        "Main effects",
        "Mean where the student acts at a transition, less that where the teacher does.",
    ),
    (
        2,
        "interactions",
        "Interactions",
        "Mean where one model acts at both transitions, less that where each acts at one.",
    ),
)
"""How many transitions, name, title, and what the contrast over all strings is."""


def groups(records: Iterable[Record]) -> list[Group]:
    """Split records by experiment and by the setting that the rows of its tables must share."""
    kept, replaced = latest_records(r for r in records if r.experiment in _SHARED)
    split: dict[str, list[Record]] = {}
    for record in kept:
        split.setdefault(_group_name(record), []).append(record)
    old = [_group_name(record) for record in replaced]
    return [Group(name, split[name][0].experiment, tuple(split[name]), old.count(name)) for name in sorted(split)]


def build(records: Iterable[Record]) -> list[Table]:
    """Every table that these records belong to; records of other experiments are left out."""
    makers: dict[str, Callable[[Group], list[Table]]] = {
        "covariate-shift": shift_tables,
        "systems": compare_tables,
        "prompt-inversion": inversion_tables,
    }
    return [table for group in groups(records) for table in makers[group.experiment](group)]


def shift_tables(group: Group) -> list[Table]:
    """The two pure runs and Tables 2, 3, 4; the factorial's three where its strings or effects were measured."""
    tables = [_pure(group), *(_beside_paper(group, *table) for table in _PAPER_TABLES)]
    transitions = _transitions(group)
    tables += _factorial(group, transitions) if transitions else []
    return [table for table in tables if table.rows]


def compare_tables(group: Group) -> list[Table]:
    """Systems side by side, and their paired differences, where there are any; rows as the newest protocol has them."""
    source, label, title, text, column, note = _COMPARED[group.experiment]
    newest = max(group.records, key=lambda r: r.age_key()).protocol
    wanted = {str(row["name"]): row for row in _mappings(newest.get("systems"))}
    order = {name: place for place, name in enumerate(wanted)}
    systems = sorted(group.of_kind("system"), key=lambda r: (_name(r).casefold(), -_number(r.cell.get("steps"))))
    held = {_name(r) for r in systems}
    numbers = paper_rows(source)
    rows = [_system_row(_name(r), r, r.cell, numbers) for r in systems]
    rows += [_system_row(name, None, row, numbers) for name, row in wanted.items() if name not in held]
    rows.sort(key=lambda row: order.get(row.wanted, len(order)))
    columns = [Column(key.lower(), key) for key in ("System", "Steps", "Solver", "Guidance")]
    columns.append(Column("recipe", "Recipe", in_caption=True))
    beside = any(cell is not None for row in rows for cell in row.paper)
    paper = [column] if beside else []
    elsewhere = not str(group.records[0].data.get("reference")).startswith("coco")
    note += ", another world: compare directions, not values." if elsewhere else "."
    table = _table(group, label, title, text, columns, rows, paper=paper, notes=[note] if beside else [])
    made = [replace(table, best=_best(group, table, rows))]
    made.append(_named(group, "difference", "differences", "Differences", _DIFFERENCES, "Difference", tested=True))
    return [table for table in made if table.rows]


def inversion_tables(group: Group) -> list[Table]:
    """Table 5, its differences, and the inverters side by side: what the teacher makes of each one's prompts."""
    text = "Inverters on the same pictures: what the teacher draws from their prompts, and the share of the captions found."
    paired = "Paired differences between inverters on the same pictures."
    made = [
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
    return compare_tables(group) + [table for table in made if table.rows]


def _named(group: Group, kind: str, name: str, title: str, text: str, header: str, *, tested: bool = False) -> Table:
    """The cells of a kind by their names."""
    rows = [_Row((_name(r),), _name(r), r) for r in sorted(group.of_kind(kind), key=_name)]
    return _table(group, name, title, text, [Column(header.lower(), header)], rows, tested=tested)


def _system_row(
    name: str, record: Record | None, cell: Mapping[str, Any], numbers: Mapping[tuple[str, int], Decimal]
) -> _Row:
    """A system's row; without a record its place says what was asked for, and the paper's number stands by itself."""
    steps = int(_number(cell["steps"])) if cell.get("steps") else None
    paper = (numbers.get((str(cell.get("paper")), steps or 0)),)
    if record is None:
        return _Row((name, steps, None, None, None), name, None, paper)
    return _Row((name, steps, record.solver, _guidance(record), record.recipe), name, record, paper)


def _best(group: Group, table: Table, rows: Sequence[_Row]) -> frozenset[tuple[int, int]]:
    """The best cell of each measured column that is significantly better than the next best; the columns are one family."""
    p_values = {}
    for place, column in enumerate(table.columns):
        metric = column.key if column.source == "measured" else ""
        held = [
            (i, row.wanted, row.record.metrics[metric])
            for i, row in enumerate(rows)
            if row.record and metric in row.record.metrics
        ]
        leader = best_and_p_value([(name, value) for _, name, value in held], metric, group.records)
        if leader is not None:
            p_values[held[leader[0]][0], place] = leader[1]
    return frozenset(cell for cell, corrected in holm(p_values).items() if corrected < LEVEL)


def _pure(group: Group) -> Table:
    rows = [_Row((m,), f"the pure {m}", group.find(kind="pure", model=m)) for m in ("teacher", "student")]
    text = "The teacher alone and the student alone, the two ends of every rollout."
    note = "The paper (SD 1.5 on COCO) reports an FID of about 22.5 for both and a CLIP score of 0.321 for its teacher."
    return _table(group, "pure", "Pure runs", text, [Column("model", "Model")], rows, notes=[note])


def _beside_paper(group: Group, name: str, kind: str, key: str, text: str) -> Table:
    """The paper's Table 2, 3 or 4: its rows and any others measured, by the number `key`, falling."""
    paper = _paper(name)
    values = sorted({*paper, *(_number(r.cell[key]) for r in group.of_kind(kind))}, reverse=True)
    rows = [
        _Row((_tidy(v),), f"{key} = {v:g}", group.find(kind=kind, **{key: v}), paper.get(v, (None, None)))
        for v in values
    ]
    columns = [Column("paper_fid", "FID", "paper", "lower"), Column("paper_clip", "CLIP", "paper", "higher")]
    note = "The paper's numbers are of SD 1.5 on COCO, another world: compare directions, not values."
    return _table(group, name, f"Table {name[-1]}", text, [Column(key, key)], rows, paper=columns, notes=[note])


def _factorial(group: Group, transitions: int) -> list[Table]:
    strings = ["".join(letters) for letters in itertools.product("TS", repeat=transitions)]
    rows = [_Row((s,), f"string {s}", group.find(kind="string", string=s)) for s in strings]
    text = "All teacher/student strings: who acts at each transition, T the teacher and S the student."
    tables = [_table(group, "strings", "Factorial", text, [Column("string", "String")], rows)]
    for size, name, title, text in _EFFECTS:
        which = list(itertools.combinations(range(transitions), size))
        names = [" × ".join(_transition(group, i) for i in indices) for indices in which]
        found = [group.find(kind="effect", transitions=list(indices)) for indices in which]
        rows = [_Row((n,), f"effect of {n}", r) for n, r in zip(names, found, strict=True)]
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
    marked = [MARKED.format(len(corrected))] if corrected else []
    explained = dict.fromkeys(f"{DOUBT} {note}" for found in doubts.values() for note in found)
    return Table(
        group.name, name, title, " ".join([text, *marked, _setting(group)]), tuple(columns), tuple(cells),
        notes=(*notes, *explained, *_remarks(group, rows)), missing=tuple(_missing(rows, list(metrics))),
        significant=frozenset(cell for cell, p in corrected.items() if p < LEVEL), corrected=corrected,
    )  # fmt: skip


def _doubts(rows: Sequence[_Row], metric: str) -> list[str]:
    """What notes say of a metric's values that are not to be trusted."""
    held = [row.record.metrics[metric].estimate.note for row in rows if row.record and metric in row.record.metrics]
    return [note for note in held if note is not None]


def _measured(record: Record | None, metrics: Sequence[str], has_nfe: bool) -> list[Cell]:
    if record is None:
        return [None] * (len(metrics) + 1 + has_nfe)
    values: list[Cell] = [record.metrics[m].estimate if m in record.metrics else None for m in metrics]
    return [*values, record.n_done, *([record.nfe] if has_nfe else [])]


def _missing(rows: Sequence[_Row], metrics: Sequence[str]) -> list[str]:
    gone = [f"{row.wanted}: no record" for row in rows if row.record is None]
    held = [(row.wanted, row.record) for row in rows if row.record]
    return gone + [f"{name}: its record has no {m}" for name, r in held for m in metrics if m not in r.metrics]


def _remarks(group: Group, rows: Sequence[_Row]) -> list[str]:
    held = [(row.wanted, row.record) for row in rows if row.record]
    short = [f"{name} ({r.n_done} of {r.n_asked})" for name, r in held if r.n_done < r.n_asked]
    remarks = [f"Fewer samples done than asked: {'; '.join(short)}."] if short else []
    if group.replaced:
        remarks.append(
            f"The newest records are shown; older ones with other numbers, kept beside them: {group.replaced}."
        )
    return remarks


def _metrics(records: Iterable[Record]) -> dict[str, Direction]:
    return {name: metric.direction for record in records for name, metric in record.metrics.items()}


def _setting(group: Group) -> str:
    """What all rows share, as a sentence."""
    first = group.records[0]
    systems = first.systems.items() if group.experiment == "covariate-shift" else ()
    data = " ".join(str(first.data[key]) for key in ("reference", "split") if key in first.data)
    parts = [f"{role} {system.reference}" for role, system in sorted(systems, reverse=True)]
    parts += [f"data {data}", f"recipe {first.recipe}"]
    if group.experiment == "covariate-shift":
        parts += [f"solver {first.solver}", f"guidance {_guidance(first)}", f"reflection {_reflection(first)}"]
    parts += [f"seed {', '.join(map(str, first.seeds)) or 'unknown'}", f"N asked {first.n_asked}"]
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}; brackets hold 95% intervals."


def _transitions(group: Group) -> int:
    """The number of transitions that the factorial's records speak of; 0 where there are none."""
    lengths = [len(str(r.cell["string"])) for r in group.of_kind("string")]
    effects = [r.cell["transitions"] for r in group.of_kind("effect")]
    return max([0, *lengths, *(int(_number(i)) + 1 for e in effects if isinstance(e, list) for i in e)])


def _transition(group: Group, index: int) -> str:
    grid = [*group.records[0].grid, "clean"]
    return f"{grid[index]}→{grid[index + 1]}" if index + 1 < len(grid) else f"transition {index + 1}"


def paper_rows(table: str = "table1") -> dict[tuple[str, int], Decimal]:
    """The paper's numbers of Table 1 (FID) or 5 (LPIPS diversity), by model and steps."""
    with (paper_results() / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return {(name, int(steps)): Decimal(value) for name, steps, value in list(csv.reader(file))[1:]}


def _paper(name: str) -> dict[float, tuple[Cell, ...]]:
    """The paper's (FID, CLIP) by the value in its first column."""
    with (paper_results() / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return {float(first): (Decimal(fid), Decimal(clip)) for first, fid, clip in list(csv.reader(file))[1:]}


def _group_name(record: Record) -> str:
    """A folder name: the experiment, the student where there is one, and a hash of what the rows share."""
    shared = record.digest_of(_SHARED[record.experiment])[:8]
    student = record.systems.get("student") if record.experiment == "covariate-shift" else None
    words = [record.experiment, PurePath(student.reference).name if student else "", shared]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(word for word in words if word))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _tidy(value: float) -> float | int:
    return int(value) if value > 1 and value == int(value) else value


def _name(record: Record) -> str:
    return str(record.cell["name"])


def _mappings(value: object) -> list[Mapping[str, Any]]:
    """The rows of a protocol's list."""
    return [row for row in value if isinstance(row, dict) and "name" in row] if isinstance(value, list) else []


def _guidance(record: Record) -> str:
    return "none" if record.guidance_scale is None else f"{record.guidance_scale:g}"


def _reflection(record: Record) -> str:
    value = record.reflection
    return str(value.get("mode", "yes")) if isinstance(value, dict) else str(value or "none")
