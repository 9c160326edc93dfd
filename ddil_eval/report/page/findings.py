"""What the records say, in sentences that are filled from the tables."""

from __future__ import annotations

from collections.abc import Mapping

from ddil_eval.report.comparisons import is_sound
from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.rendering import decimals_of, print_cell
from ddil_eval.report.table_type import Column, Table

MOST_METRICS = 4
"""The most metrics of a table that sentences and charts tell of; its other columns stand in the table."""
TESTED = {
    "differences": "paired difference",
    "inverter-differences": "difference of inverters",
    "main-effects": "main effect",
    "interactions": "interaction",
    "drift-ratios": "ratio",
    "drift-states": "distance of states",
    "drift-difference": "difference of students",
    "drift-group-difference": "difference of groups",
}
"""The tables with tests, and what one row is."""


def headline(tables: Mapping[str, Table]) -> list[str]:
    """Return the sentences that matter most about a group of tables: its best system, and how many tests count."""
    sentences = [best_sentence(tables[name]) for name in ("systems", "table5") if name in tables]
    sentences += [
        count_sentence(tables[name], what)
        for name, what in TESTED.items()
        if name in tables and name in ("differences", "main-effects", "drift-ratios")
    ]
    if "main-effects" in tables:
        sentences.append(effect_sentence(tables["main-effects"]))
    if "drift" in tables:
        sentences.append(drift_sentence(tables["drift"]))
    return [sentence for sentence in sentences if sentence]


DIVERSITY = ("lpips_", "vendi_")
"""The starts of the names of metrics of diversity."""


def best_sentence(table: Table) -> str:
    """Say which system has the best value of the first metric and what it costs, beside the costliest system."""
    places = [place for place, column in enumerate(table.columns) if column.interval]
    if not places:
        return ""
    place, column = places[0], table.columns[places[0]]
    cells = {r: row[place] for r, row in enumerate(table.rows)}
    measured = {r: cell for r, cell in cells.items() if isinstance(cell, RecordedEstimate) and is_sound(cell)}
    if len(measured) < 2:
        return ""
    sign = -1 if column.direction == "higher" else 1
    best = min(measured, key=lambda r: sign * measured[r].value)
    digits = decimals_of(list(measured.values()))
    costs = {r: cost for r in measured if (cost := _cost(table, r)) is not None}
    at = f" at an NFE of {costs[best]:g}" if best in costs else ""
    diverse = column.direction == "higher" and column.header.startswith(DIVERSITY)
    sure = "" if (best, place) in table.best else ", not significantly better than the second best"
    rank = "highest" if diverse else "best"
    sentence = (
        f"Of {len(measured)} systems, {table.rows[best][0]} has the {rank} {column.header}, "
        f"{' '.join(print_cell(measured[best], digits)[:2])}{at}{sure}."
    )
    if diverse:
        sentence += " Images that are drawn wrong raise it too."
    costly = max(costs, key=lambda r: costs[r], default=best)
    if costs.get(costly, 0) > costs.get(best, 0):
        shown = " ".join(print_cell(measured[costly], digits)[:2])
        sentence += f" The costliest, {table.rows[costly][0]} with an NFE of {costs[costly]:g}, has {shown}."
    return sentence


def count_sentence(table: Table, what: str) -> str:
    """Say how many tests of a table are significant, and how many of these are better."""
    tests = len(table.corrected)
    if not tests:
        return ""
    noun = f"test of a {what}" if tests == 1 else f"tests of {what}s"
    verdicts = [verdict(table.rows[r][c], table.columns[c]) for r, c in table.significant]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    verb = "is" if len(verdicts) == 1 else "are"
    rest = f" {better} better and {worse} worse." if verdicts else ""
    return f"{len(verdicts)} of {tests} {noun} {verb} significant after Holm's correction{':' + rest if rest else '.'}"


def effect_sentence(table: Table) -> str:
    """Say which significant effect is the largest in terms of its interval."""
    best, sentence = 0.0, ""
    for r, c in sorted(table.significant):
        cell, column = table.rows[r][c], table.columns[c]
        if not isinstance(cell, RecordedEstimate):
            continue
        size = abs(cell.value) / max(cell.high - cell.low, 1e-300)
        if size > best:
            best, shown = size, _shown(cell, decimals_of([row[c] for row in table.rows]))
            sentence = (
                f"The clearest: the student in place of the teacher at {table.rows[r][0]} changes {column.header} by "
                f"{shown}, which is {verdict(cell, column)}."
            )
    return sentence


def drift_sentence(table: Table) -> str:
    """Say the covariate-shift ratio over all transitions."""
    for place, column in enumerate(table.columns):
        for row in table.rows:
            cell = row[place]
            if column.key == "shift_ratio" and row[0] == "all" and isinstance(cell, RecordedEstimate):
                shown = " ".join(print_cell(cell, decimals_of([cell]))[:2])
                return f"Over all transitions, the covariate-shift ratio is {shown}; 1 is no covariate shift."
    return ""


def in_words(table: Table) -> list[str]:
    """Say for each row of a table with tests which metrics change significantly, and which do not."""
    sentences = []
    metrics = [(place, column) for place, column in enumerate(table.columns) if column.tested][:MOST_METRICS]
    digits = {place: decimals_of([row[place] for row in table.rows]) for place, _ in metrics}
    for r, row in enumerate(table.rows):
        changes, rest = [], []
        for place, column in metrics:
            cell = row[place]
            if not isinstance(cell, RecordedEstimate):
                continue
            if (r, place) in table.significant:
                changes.append(f"{verdict(cell, column)} {column.header} ({_shown(cell, digits[place])})")
            else:
                rest.append(column.header)
        if changes or rest:
            none = f"no significant change of {', '.join(rest)}" if rest else ""
            sentences.append(f"{row_name(table, r)}: {'; '.join([*changes, *([none] if none else [])])}.")
    return sentences


def verdict(cell: object, column: Column) -> str:
    """Return "better" or "worse" for a difference, or "higher" or "lower" where no direction is known."""
    rises = isinstance(cell, RecordedEstimate) and cell.value > 0
    if column.direction is None:
        return "higher" if rises else "lower"
    return "better" if rises == (column.direction == "higher") else "worse"


def row_name(table: Table, row: int) -> str:
    """Return the name of a row: its first cell and, where the time stands in another column, the time."""
    first = str(table.rows[row][0])
    times = [place for place, column in enumerate(table.columns) if column.key == "t" and place > 0]
    return f"{first}, t = {table.rows[row][times[0]]}" if times else first


def _shown(difference: RecordedEstimate, digits: int) -> str:
    """Return a difference with its sign and its interval."""
    text = " ".join(print_cell(difference, digits)[:2]).replace("-", "−")
    return f"+{text}" if difference.value > 0 else text


def _cost(table: Table, row: int) -> float | None:
    for place, column in enumerate(table.columns):
        if column.key == "nfe":
            cost = table.rows[row][place]
            return float(cost) if isinstance(cost, int | float) else None
    return None
