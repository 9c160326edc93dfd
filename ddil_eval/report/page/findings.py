"""What the records say, in sentences that are filled from the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ddil_core.support.text import listed
from ddil_eval.report.comparisons import is_sound
from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.rendering import decimals_of, print_cell
from ddil_eval.report.table_type import Column, Table

MOST_METRICS = 4
"""The most metrics of a table that sentences and charts tell of; its other columns stand in the table."""
_FIRST = ("log_shift_ratio", "disagreement_student", "disagreement_data", "log_rollout_ratio")
"""The metrics that they tell of first. The others have the order of the table."""
TESTED = {
    "differences": "paired differences",
    "inverter-differences": "differences of inverters",
    "main-effects": "main effects",
    "interactions": "interactions",
    "drift-ratios": "ratios",
    "drift-states": "distances of states",
    "drift-difference": "differences of students",
    "drift-group-difference": "differences of groups",
}
"""The tables with tests, and what their rows are."""


def headline(tables: Mapping[str, Table]) -> list[str]:
    """Return the sentences that matter most about a group of tables: what was found, and how many tests count."""
    sentences = [best_sentence(tables[name]) for name in ("systems", "table5") if name in tables]
    sentences += [
        count_sentence(tables[name], TESTED[name])
        for name in ("differences", "main-effects", "drift-ratios")
        if name in tables
    ]
    if "pure" in tables:
        sentences.append(pure_sentence(tables["pure"]))
    if "main-effects" in tables:
        sentences.append(effect_sentence(tables["main-effects"]))
    sentences += [drift_sentence(tables[name]) for name in ("drift", "drift-group") if name in tables]
    for name in ("drift-difference", "drift-group-difference"):
        if name in tables:
            sentences += [*change_sentences(tables[name]), count_sentence(tables[name], TESTED[name])]
    return [sentence for sentence in sentences if sentence]


def told(table: Table) -> list[tuple[int, Column]]:
    """Return the columns of metrics that sentences and charts tell of, each with its place in the table."""
    metrics = [(place, column) for place, column in enumerate(table.columns) if column.interval]
    metrics.sort(key=lambda metric: _FIRST.index(metric[1].key) if metric[1].key in _FIRST else len(_FIRST))
    return metrics[:MOST_METRICS]


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


def pure_sentence(table: Table) -> str:
    """Say what the student alone and the teacher alone reach, in the last metric that both have.

    The last is of single images. The first is a distance of sets, which hardly tells the two apart.
    """
    rows = {str(row[0]): row for row in table.rows}
    for place, column in reversed(list(enumerate(table.columns))):
        cells = {name: rows[name][place] for name in ("student", "teacher") if name in rows}
        sound = {name: cell for name, cell in cells.items() if isinstance(cell, RecordedEstimate) and is_sound(cell)}
        if column.interval and len(sound) == 2:
            digits = decimals_of(list(sound.values()))
            shown = {name: " ".join(print_cell(cell, digits)[:2]) for name, cell in sound.items()}
            return (
                f"The student alone has a {column.header} of {shown['student']}, and the teacher alone of "
                f"{shown['teacher']}."
            )
    return ""


def count_sentence(table: Table, what: str) -> str:
    """Say how many tests of a table are significant, and how many of these are better."""
    tests = len(table.corrected)
    if not tests:
        return ""
    noun = f"test{'' if tests == 1 else 's'} of {what}"
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
    """Say the covariate-shift ratio over all transitions: of the student, or of each group of students."""
    ratios = _over_all(table, "shift_ratio")
    digits = decimals_of(list(ratios.values()))
    parts = list[str]()
    for r, ratio in ratios.items():
        of = f" of {group}" if (group := group_name(table, r)) else ""
        parts.append(
            f"{'that' if parts else 'the covariate-shift ratio'}{of} is {' '.join(print_cell(ratio, digits)[:2])}"
        )
    return f"Over all transitions, {listed(parts, 'and')}; 1 is no covariate shift." if parts else ""


def change_sentences(table: Table) -> list[str]:
    """Say for each difference by how much it changes the covariate-shift ratio over all transitions, in per cent."""
    sentences = []
    for r, cell in _over_all(table, "log_shift_ratio").items():
        if max(abs(cell.low), abs(cell.high)) > _LARGEST_LOGARITHM:
            continue
        low, value, high = (100 * math.expm1(number) for number in (cell.low, cell.value, cell.high))
        change = RecordedEstimate(value=value, low=low, high=high, n=cell.n, p_value=cell.p_value)
        number, interval, *p_value = print_cell(change, max(1, decimals_of([change])))
        text = ", ".join([f"{number} % {interval}".replace("-", "−"), *p_value])
        of = group_name(table, r) or "The first student less the second"
        sentences.append(f"{of}: the ratio changes by {'+' if value > 0 else ''}{text}.")
    return sentences


_LARGEST_LOGARITHM = 100
"""The largest logarithm of a ratio that a sentence shows in per cent."""


def _over_all(table: Table, metric: str) -> dict[int, RecordedEstimate]:
    """Return the estimates of a metric over all transitions, by row."""
    places = {column.key: place for place, column in enumerate(table.columns)}
    if not {"t", metric} <= places.keys():
        return {}
    rows = {r: row[places[metric]] for r, row in enumerate(table.rows) if row[places["t"]] == "all"}
    return {r: cell for r, cell in rows.items() if isinstance(cell, RecordedEstimate)}


def in_words(table: Table) -> list[str]:
    """Say for each row of a table with tests which metrics change significantly, and which do not.

    Transitions of which the same is said share a sentence.
    """
    said = _said(table)
    if _time_place(table) is None:
        return [f"{row_name(table, r)}: {text}." for r, text in said.items()]
    alike: dict[tuple[str, str], list[str]] = {}
    for r, text in said.items():
        alike.setdefault((group_name(table, r), text), []).append(place_name(table, r))
    return [f"{', '.join(filter(None, [group, *places]))}: {text}." for (group, text), places in alike.items()]


def _said(table: Table) -> dict[int, str]:
    """Return what is said of each row of a table with tests."""
    said = {}
    metrics = [(place, column) for place, column in told(table) if column.tested]
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
            said[r] = "; ".join([*changes, *([none] if none else [])])
    return said


def verdict(cell: object, column: Column) -> str:
    """Return "better" or "worse" for a difference, or "higher" or "lower" where no direction is known."""
    rises = isinstance(cell, RecordedEstimate) and cell.value > 0
    if column.direction is None:
        return "higher" if rises else "lower"
    return "better" if rises == (column.direction == "higher") else "worse"


def row_name(table: Table, row: int) -> str:
    """Return the name of a row: its first cell, its time, or both."""
    return ", ".join(name for name in (group_name(table, row), place_name(table, row)) if name)


def group_name(table: Table, row: int) -> str:
    """Return the first cell of a row where the time stands in another one, else an empty text."""
    return str(table.rows[row][0]) if _time_place(table) else ""


def place_name(table: Table, row: int) -> str:
    """Return the time of a row in words, or its first cell where the table has no times."""
    place = _time_place(table)
    cell = table.rows[row][place or 0]
    if place is None:
        return str(cell)
    return "all transitions" if cell == "all" else f"t = {print_cell(cell, 0)[0]}"


def _time_place(table: Table) -> int | None:
    return next((place for place, column in enumerate(table.columns) if column.key == "t"), None)


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
