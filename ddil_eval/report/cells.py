"""The entries that a record's cell needs, by its kind. They place the record in a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ddil_core.support.paths import shown

DRIFT_KINDS = ("drift", "drift-ratios", "drift-states", "drift-paths", "drift-difference")
"""The kinds of cells of the drift experiment: of one student, or of two."""
DRIFT_GROUP_KINDS = ("drift-group", "drift-group-spread", "drift-group-difference", "drift-group-difference-spread")
"""Its kinds of cells of groups of students, which differ in the seed of their training."""
MOST_TRANSITIONS = 12
"""The largest number of transitions in a factorial. Each further transition doubles the number of strings."""


@dataclass(frozen=True)
class _Entry:
    """A rule for one entry of a cell.

    Attributes:
        fits: Whether a value is allowed.
        what: The allowed values, in words.
        needed: Whether the cell must have the entry.
    """

    fits: Callable[[object], bool]
    what: str
    needed: bool = True


def misfit(cell: Mapping[str, object]) -> str | None:
    """Return the fault of a cell in one sentence, or None. Kinds that no table shows have no faults."""
    kind = cell["kind"]
    for key, entry in _KINDS.get(str(kind), {}).items():
        value = cell.get(key)
        if value is None and not entry.needed:
            continue
        if key not in cell:
            return f"a cell of the kind {kind!r} needs {key!r}, {entry.what}"
        if not entry.fits(value):
            return f"{key!r} of a cell of the kind {kind!r} is {entry.what}, not {shown(value)}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_string(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[TS]{{1,{MOST_TRANSITIONS}}}", value) is not None


def _are_places(value: object) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= 2 or not all(type(place) is int for place in value):
        return False
    return value == sorted(set(value)) and value[0] >= 0 and value[-1] < MOST_TRANSITIONS


def _are_two(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_time(value: object) -> bool:
    return value == "all" or _is_number(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value < 10**15


_SWITCH = {"switch_t": _Entry(_is_number, "a number")}
_NAMED = {"name": _Entry(_is_text, "a text")}
_PAIR = _NAMED | {"of": _Entry(_are_two, "a list of two texts", needed=False)}
_KINDS: dict[str, dict[str, _Entry]] = {
    "p_teacher": {"p_teacher": _Entry(_is_number, "a number")},
    "teacher_then_student": _SWITCH,
    "student_then_teacher": _SWITCH,
    "pure": {"model": _Entry(_is_text, "a text")},
    "string": {"string": _Entry(_is_string, f"1 to {MOST_TRANSITIONS} of the letters T and S")},
    "effect": {"transitions": _Entry(_are_places, f"a list of one or two places below {MOST_TRANSITIONS}, rising")},
    "system": _NAMED
    | {
        "steps": _Entry(_is_count, "a whole number from 1", needed=False),
        "paper": _Entry(_is_text, "a text", needed=False),
        "training_seeds": _Entry(_is_count, "a whole number from 1", needed=False),
    },
    "difference": _PAIR,
    "pair": _PAIR,
    "inverter": _NAMED,
    "inverter-difference": _PAIR,
}
_TIME = {"t": _Entry(_is_time, "a number or 'all'")}
_SEEDS = {"training_seeds": _Entry(_is_count, "a whole number from 1")}
_KINDS |= dict.fromkeys(DRIFT_KINDS, _TIME) | dict.fromkeys(DRIFT_GROUP_KINDS, _TIME | _NAMED | _SEEDS)
