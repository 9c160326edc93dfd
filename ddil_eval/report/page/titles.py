"""The title of each group of records on the page. No two are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from ddil_core.support.text import listed
from ddil_eval.report.tables import Group

_TITLES = {
    "systems": "Systems",
    "covariate-shift": "Covariate shift",
    "drift": "Drift",
    "prompt-inversion": "Prompt inversion",
}
"""The titles of the experiments."""
_ANALYSES = ("covariate-shift", "drift")
"""The experiments whose records of one group have the same models."""
_MOST_NAMES = 3
"""The most groups of students that a title names."""


def titles(groups: Sequence[Group]) -> dict[str, str]:
    """Return the title of each group of records by its name. Titles that would be the same say what differs."""
    found = {group.name: _title(group) for group in groups}
    for title, count in Counter(found.values()).items():
        alike = [group for group in groups if found[group.name] == title]
        if count > 1:
            for group, words in zip(alike, _differences(alike), strict=True):
                found[group.name] = ", ".join([title, *words])
    return found


def _title(group: Group) -> str:
    """Return the experiment, and whom an analysis is of: a student, two, or groups of them and their steps."""
    first = group.records[0]
    title = _TITLES.get(group.experiment, group.experiment.replace("-", " ").capitalize())
    if first.protocol.get("experiment") == "score":
        return "Folders of images"
    if group.experiment not in _ANALYSES:
        return title
    students = [first.systems[role].reference for role in ("student", "first", "second") if role in first.systems]
    if students:
        short = [PurePath(student).name for student in students]
        return f"{title} of {listed(short if len(set(short)) == len(short) else students, 'and')}"
    for kind in ("drift-group", "drift-group-difference"):
        names = sorted({str(record.cell["name"]) for record in group.of_kind(kind)})
        if names:
            of = listed(names, "and") if len(names) <= _MOST_NAMES else f"{len(names)} groups"
            return f"{title} of {of}, {len(first.grid)} step{'' if len(first.grid) == 1 else 's'}"
    return title


def _differences(groups: Sequence[Group]) -> list[list[str]]:
    """Return the settings of each group that tell it apart from the others, in words, and no more than needed."""
    settings = [_settings(group) for group in groups]
    words: list[list[str]] = [[] for _ in groups]
    for name in dict.fromkeys(name for own in settings for name in own):
        longer = [[*said, own[name]] if name in own else said for said, own in zip(words, settings, strict=True)]
        if len(set(map(tuple, longer))) > len(set(map(tuple, words))):
            words = longer
    return words


def _settings(group: Group) -> dict[str, str]:
    """Return what the rows of a group share, in words: what says most first, and the end of its folder's name last."""
    first = group.records[0]
    found: dict[str, object] = {}
    if group.experiment in _ANALYSES:
        found |= {role: model.reference for role, model in first.systems.items()}
        found |= {"steps": len(first.grid), "guidance": first.guidance_scale, "solver": first.solver}
    found["data"] = " ".join(str(first.data[key]) for key in ("reference", "split") if key in first.data)
    found |= {"recipe": first.recipe, "seed": ", ".join(map(str, first.seeds)), "N": first.n_asked}
    asked = {name: value for name, value in first.protocol.items() if isinstance(value, str | int | float)}
    found = {**found, **{name: value for name, value in asked.items() if name not in found}, "folder": group.name}
    return {name: f"{name.replace('_', ' ')} {value}" for name, value in found.items()}
