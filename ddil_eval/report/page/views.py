"""What the page shows of tables and records: plain texts for the template, which escapes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ddil_core.support.size import pixels
from ddil_eval.report.records import Record, RecordedCompute, digest
from ddil_eval.report.rendering import header_text, marks_after, notes_below, printed_cells
from ddil_eval.report.table_type import Table


@dataclass(frozen=True)
class CellView:
    """A cell: its value, the lines below it, its marks, and the record that it comes from, as an anchor."""

    value: str
    below: tuple[str, ...]
    marks: str
    best: bool
    record: str | None


@dataclass(frozen=True)
class TableView:
    """A table: its title and caption, its headers with their source, its rows of cells, and the notes below."""

    title: str
    caption: str
    headers: tuple[tuple[str, str], ...]
    rows: tuple[tuple[CellView, ...], ...]
    notes: tuple[str, ...]
    paper: bool


@dataclass(frozen=True)
class RecordView:
    """A record: its anchor, its name, its settings as (name, value), and the anchor of its protocol."""

    anchor: str
    name: str
    settings: tuple[tuple[str, str], ...]
    metrics: tuple[tuple[str, str, str], ...]
    protocol: str


@dataclass(frozen=True)
class ProtocolView:
    """A protocol that records share: its anchor, its name, and its text."""

    anchor: str
    name: str
    text: str


def view_table(table: Table) -> TableView:
    """Return a table for the page. A cell that was measured names its record; the caption's columns are left out."""
    shown = [place for place, column in enumerate(table.columns) if not column.in_caption]
    rows = []
    for r, row in enumerate(printed_cells(table)):
        record = table.records[r] if r < len(table.records) else None
        cells = []
        for place in shown:
            value, *below = row[place]
            if table.columns[place].source != "setting":
                value, *below = (line.replace("-", "−") for line in row[place])
            measured = table.columns[place].source == "measured" and value and record is not None
            cells.append(
                CellView(
                    value,
                    tuple(below),
                    marks_after(table, r, place),
                    (r, place) in table.best,
                    anchor(record) if measured and record is not None else None,
                )
            )
        rows.append(tuple(cells))
    columns = [table.columns[place] for place in shown]
    return TableView(
        title=table.title,
        caption=table.caption,
        headers=tuple((header_text(column), column.source) for column in columns),
        rows=tuple(rows),
        notes=tuple(notes_below(table)),
        paper=any(column.source == "paper" for column in columns),
    )


def anchor(record: Record) -> str:
    """Return the anchor of a record on the page."""
    return f"r-{record.identity()[:12]}"


def view_records(records: Iterable[Record], protocols: dict[str, ProtocolView]) -> list[RecordView]:
    """Return records for the page, and add their protocols to ``protocols``, each once."""
    views = []
    for record in records:
        name = f"p-{digest(record.protocol)[:12]}"
        text = json.dumps(record.protocol, indent=1, ensure_ascii=False)
        protocols.setdefault(name, ProtocolView(name, f"{record.experiment}, {name.removeprefix('p-')}", text))
        metrics = [(key, _numbers(record, key), _network(record, key)) for key in record.metrics]
        views.append(RecordView(anchor(record), record_name(record), tuple(_settings(record)), tuple(metrics), name))
    return views


def record_name(record: Record) -> str:
    """Return the experiment and the cell of a record in words."""
    rest = [str(value) for key, value in record.cell.items() if key not in ("kind", "of", "paper")]
    return f"{record.experiment}: {record.kind.replace('_', ' ')} {' · '.join(rest)}".rstrip()


def _settings(record: Record) -> list[tuple[str, str]]:
    compute = (record.compute or RecordedCompute()).words() or "computed in fp32"
    models = [
        (f"model {name}", f"{model.reference}, SHA-256 {model.weights_sha256 or 'unknown'}")
        for name, model in record.systems.items()
    ]
    return [
        *models,
        *((f"data {key}", _plain(value)) for key, value in record.data.items()),
        ("recipe", record.recipe),
        ("solver", record.solver),
        ("grid", _joined(record.grid)),
        ("guidance scale", "none" if record.guidance_scale is None else f"{record.guidance_scale:g}"),
        ("reflection", _plain(record.reflection)),
        ("compute", compute),
        *([] if record.size is None else [("size", pixels(record.size))]),
        ("NFE", "" if record.nfe is None else f"{record.nfe:g}"),
        ("seeds", _joined(record.seeds)),
        ("samples", f"{record.n_done} of {record.n_asked}"),
        *([("images SHA-256", record.pictures_sha256)] if record.pictures_sha256 else []),
        ("protocol SHA-256", record.protocol_hash),
        ("identity", record.identity()),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("commit", record.commit or "unknown"),
        ("device", record.device),
        ("wall time", f"{record.wall_time_s:.0f} s"),
        ("created", record.created),
    ]


def _numbers(record: Record, metric: str) -> str:
    estimate = record.metrics[metric].estimate
    p_value = "" if estimate.p_value is None else f", p = {estimate.p_value:.3g}"
    note = "" if estimate.note is None else f"; {estimate.note}"
    return f"{estimate.value:.6g} [{estimate.low:.6g}, {estimate.high:.6g}], n = {estimate.n}{p_value}{note}"


def _network(record: Record, metric: str) -> str:
    network = record.metrics[metric].network
    return "" if network is None else json.dumps(network, ensure_ascii=False)


def _joined(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
