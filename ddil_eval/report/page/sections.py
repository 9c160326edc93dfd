"""The sections of the page. An addition is one function and one row of ``SECTIONS``, and a block of the template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ddil_eval.report.page.figures import charts_of, quality_and_cost
from ddil_eval.report.page.findings import TESTED, headline, in_words
from ddil_eval.report.page.galleries import Gallery, galleries
from ddil_eval.report.page.missing import gaps
from ddil_eval.report.page.titles import titles
from ddil_eval.report.page.views import ProtocolView, view_records, view_table
from ddil_eval.report.records import Record
from ddil_eval.report.strips import FOLDER, INDEX
from ddil_eval.report.table_type import Table
from ddil_eval.report.tables import Group, groups


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        anchor: Its anchor.
        title: Its title.
        template: The macro of the template that draws it.
        content: What the macro gets.
    """

    anchor: str
    title: str
    template: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What the page is made from: the results folder, its newest records, and their tables."""

    folder: Path
    records: Sequence[Record]
    tables: Sequence[Table]

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of records, in the order of the tables."""
        return groups(self.records)

    @cached_property
    def titles(self) -> dict[str, str]:
        """The title of each group by its name."""
        return titles(self.groups)

    @cached_property
    def galleries(self) -> list[Gallery]:
        """The pictures; their columns have the order of the rows of tables."""
        order = [str(row[0]) for table in self.tables for row in table.rows if table.name in ("systems", "table5")]
        return galleries(self.folder, self.records, order)

    def tables_of(self, group: Group) -> dict[str, Table]:
        """Return the tables of a group by name."""
        return {table.name: table for table in self.tables if table.group == group.name}


def overview(results: Results) -> list[Section]:
    """Return the sentences that matter, by group, and the quality against the cost of the first group's systems."""
    findings = [
        (results.titles[group.name], f"g-{group.name}", headline(results.tables_of(group))) for group in results.groups
    ]
    charts = quality_and_cost(results.tables_of(results.groups[0])) if results.groups else []
    return [Section("overview", "Overview", "overview", {"findings": findings, "charts": charts})]


def measurements(results: Results) -> list[Section]:
    """Return a section for each group: its charts, its tests in words, and its tables."""
    sections = []
    for place, group in enumerate(results.groups):
        tables = results.tables_of(group)
        words = [
            (table.title, in_words(table))
            for name, table in tables.items()
            if name in TESTED and name != "interactions" and table.corrected
        ]
        charts = charts_of(tables, without=quality_and_cost if place == 0 else None)  # the overview has these
        content = {"charts": charts, "words": words, "tables": [view_table(t) for t in tables.values()]}
        sections.append(Section(f"g-{group.name}", results.titles[group.name], "measurement", content))
    return sections


def pictures(results: Results) -> list[Section]:
    """Return the galleries; nothing if the results folder holds no pictures."""
    return [Section("pictures", "Pictures", "pictures", {"galleries": results.galleries})] if results.galleries else []


def missing(results: Results) -> list[Section]:
    """Return what was not measured, and the commands that measure it."""
    held = {
        "strips": any(results.folder.rglob(f"{FOLDER}/*/{INDEX}")),
        "images": any(results.folder.rglob("images/*/made.json")),
    }
    found = gaps(results.groups, results.tables, results.folder, held)
    return [Section("missing", "What is missing", "missing", {"gaps": found})] if found else []


def origins(results: Results) -> list[Section]:
    """Return every record with its settings, and the protocols."""
    protocols: dict[str, ProtocolView] = {}
    grouped = [(results.titles[group.name], view_records(group.records, protocols)) for group in results.groups]
    content = {"groups": grouped, "protocols": list(protocols.values())}
    return [Section("records", "Records", "records", content)]


SECTIONS: tuple[Callable[[Results], list[Section]], ...] = (overview, measurements, pictures, missing, origins)
"""The sections in the order of the page."""
