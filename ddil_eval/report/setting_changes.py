"""Which settings two records of one cell do not share, in words, and which of them forbid a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ddil_core.support.size import pixels
from ddil_eval.report.records import Record, RecordedCompute

_COUNTS = re.compile(r" \([\d,]+ → [\d,]+\)$")
_NO_PREPARATION = {"name", "source", "metrics", "images", "reference"}
_SETS = ("set", "alone")
"""The kinds of metrics whose values depend on the number of images."""


def setting_changes(new: Record, old: Record) -> list[str]:
    """Return the settings that differ, old → new, in words."""
    changes = [*_of_models(new, old), *_of_data(new, old), *_of_versions(new, old)]
    return list(dict.fromkeys(changes))  # students of several training seeds change alike


def obstacle(new: Record, old: Record, metric: str) -> str | None:
    """Return why two values of a metric cannot be compared, in words, or None.

    Another model, sampling, seed or version is what a comparison tests. Another preparation of images or another
    network measures something else. A distance also depends on the reference, and on the number of images.
    """
    measured, before = new.metrics[metric], old.metrics[metric]
    if _recipe(new) != _recipe(old):
        return f"recipe {_arrow(old.recipe, new.recipe)}"
    if not _alike(_preparation(new), _preparation(old)):
        return f"another preparation of images in the recipe {_recipe(new)}"
    if measured.network and before.network and measured.network != before.network:
        return "another network or version of the metric"
    if (measured.kind, measured.direction) != (before.kind, before.direction):
        return "another kind of metric"
    if measured.kind in _SETS and measured.estimate.n != before.estimate.n:
        return f"N {_arrow(before.estimate.n, measured.estimate.n)}, on which the value depends"
    if measured.kind == "set" and not _same_reference(new, old):
        return "other reference images"
    return None


def _of_models(new: Record, old: Record) -> Iterator[str]:
    for role in sorted(new.systems.keys() | old.systems.keys()):
        after, before = new.systems.get(role), old.systems.get(role)
        if after is None or before is None:
            yield f"the model {role!r} is in one alone"
            continue
        name = f"{role} " if role in ("teacher", "student") else ""
        if after.reference != before.reference:
            yield f"{name}model {_arrow(before.reference, after.reference)}"
        if after.weights_sha256 != before.weights_sha256:
            yield f"{name}weights"
    for name, after_value, before_value in (
        ("solver", new.solver, old.solver),
        ("grid", new.grid, old.grid),
        ("guidance", new.guidance_scale, old.guidance_scale),
        ("reflection", new.reflection, old.reflection),
        ("compute", _computed(new), _computed(old)),
        ("size", _size(new), _size(old)),
        ("seed", new.seeds, old.seeds),
    ):
        if after_value != before_value:
            yield f"{name} {_arrow(before_value, after_value)}"


def _of_data(new: Record, old: Record) -> Iterator[str]:
    if new.recipe != old.recipe:
        yield f"recipe {_arrow(old.recipe, new.recipe)}"
    elif not _alike(_preparation(new), _preparation(old)):
        yield "preparation of images"
    if new.n_done != old.n_done:
        yield f"N {_arrow(old.n_done, new.n_done)}"
    for key in sorted(new.data.keys() | old.data.keys()):
        after, before = new.data.get(key), old.data.get(key)
        if after != before:
            hidden = key.endswith("_sha256")
            yield key.removesuffix("_sha256").replace("_", " ") + ("" if hidden else f" {_arrow(before, after)}")


def _of_versions(new: Record, old: Record) -> Iterator[str]:
    for package in sorted(new.versions.keys() | old.versions.keys()):
        after, before = new.versions.get(package), old.versions.get(package)
        if after != before:
            yield f"{package} {_arrow(before, after)}"


def _recipe(record: Record) -> str:
    """Return the recipe's name without the numbers of images that its label may hold."""
    return _COUNTS.sub("", record.recipe)


def _preparation(record: Record) -> object:
    recipe = record.protocol.get("recipe")
    return {k: v for k, v in recipe.items() if k not in _NO_PREPARATION} if isinstance(recipe, dict) else None


def _alike(new: object, old: object) -> bool:
    """Whether two entries are equal, or one record does not hold the entry."""
    return new is None or old is None or new == old


def _same_reference(new: Record, old: Record) -> bool:
    """Whether two records have the same reference images: by their hash if both hold it, else by name and number."""
    hashes = new.data.get("reference_sha256"), old.data.get("reference_sha256")
    if None not in hashes:
        return hashes[0] == hashes[1]
    numbers = [record.protocol.get("reference_pictures") for record in (new, old)]
    return new.data.get("reference") == old.data.get("reference") and _alike(*numbers)


def _computed(record: Record) -> str:
    return (record.compute or RecordedCompute()).words() or "fp32"


def _size(record: Record) -> str:
    return "the model's own" if record.size is None else pixels(record.size)


def _arrow(before: object, after: object) -> str:
    return f"{_words(before)} → {_words(after)}"


def _words(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_words, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if type(value) is int and value >= 10_000 else "none" if value is None else str(value)
