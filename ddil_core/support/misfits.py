"""One sentence for a configuration that does not fit: which key, what it takes, and what it was given."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ddil_core.support.keys import field_takes, section_of, takes
from ddil_core.support.paths import shown
from ddil_core.support.text import listed

LONGEST = 200
"""The most characters of a value in a message."""


def misfit(error: ValidationError, model: type[BaseModel], source: str, options: Collection[str] = ()) -> str:
    """Say in one sentence what does not fit. Of several misfits the first is said.

    Args:
        error: What pydantic raised.
        model: The configuration's class.
        source: Names the configuration, as in "the protocol a.yaml".
        options: Keys that options of a command set. A message about such a key names the option.
    """
    first = error.errors()[0]
    keys, wanted = _walk(model, first["loc"])
    where = ".".join(keys)
    if first["type"] == "extra_forbidden":
        return f"{source} has the unknown key {shown(where)}{_advice(model, keys)}"
    if first["type"] == "missing" and not _is_item(first["loc"]):
        return f"{source} lacks the key {where!r}"
    if first["type"] == "missing":  # of a list with a fixed number of values
        keys, wanted = _walk(model, first["loc"][:-1])
        where = ".".join(keys)
    if first["type"] == "value_error":
        what = str(first["ctx"]["error"])  # a message of this project, which quotes the value
    else:
        if first["type"] == "finite_number":
            wanted = wanted.replace("a number", "a finite number", 1)
        what = f"it takes {wanted or 'another value'}, not {value_text(first['input'])}"
        if first["type"] == "tuple_type" and isinstance(first["input"], str | int | float):
            what += f"; write [{first['input']}]"
    if keys and keys[0] in options:
        source, where = "--" + keys[0].replace("_", "-"), ""
    place = f" at {where!r}" if where else ""
    return f"{source} has a value that does not fit{place}: {what}"


def value_text(value: Any) -> str:
    """Write a value as YAML and JSON do, and cut a long one."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _is_item(location: Sequence[int | str]) -> bool:
    return isinstance(location[-1], int)


def _walk(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], str]:
    """Follow pydantic's location through a configuration class.

    Returns:
        The keys and places on the way, without pydantic's own names of the parts of a union; and in words what the
        last of them takes.
    """
    path, annotation, words = list[str](), Any, ""
    here: Any = model
    for step in location:
        if isinstance(here, type) and issubclass(here, BaseModel):
            path.append(str(step))
            field = _fields(here).get(str(step))
            annotation, words = (Any, "") if field is None else (field.annotation, field_takes(field))
        elif isinstance(step, int):
            path.append(str(step))
            annotation = _item(here, step)
            words = takes(annotation)
        elif get_origin(here) is dict:
            path.append(step)
            annotation = get_args(here)[1]
            words = takes(annotation)
        here = _bare(annotation)
    return path, words


def _fields(model: type[BaseModel]) -> Mapping[str, Any]:
    """Return the fields of a class by each name that a file may use."""
    fields = dict(model.model_fields)
    for field in model.model_fields.values():
        for name in getattr(field.validation_alias, "choices", ()):
            fields.setdefault(str(name), field)
    return fields


def _bare(annotation: Any) -> Any:
    """Return a type without ``Annotated`` and without null."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    kinds = [part for part in get_args(annotation) if part is not NoneType]
    return _bare(kinds[0]) if get_origin(annotation) in (Union, UnionType) and len(kinds) == 1 else annotation


def _item(annotation: Any, place: int) -> Any:
    """Return the type of an item of a list."""
    items = [item for item in get_args(annotation) if item is not Ellipsis] or [Any]
    return items[min(place, len(items) - 1)]


def _advice(model: type[BaseModel], keys: Sequence[str]) -> str:
    """Return the end of the sentence on an unknown key: the keys that may be meant, or all keys of its section."""
    *parents, key = keys
    known = _keys_at(model, parents)
    elsewhere = [path for path in _paths(model) if path.rpartition(".")[2] == key]
    elsewhere.sort(key=lambda path: not model.model_fields[path.partition(".")[0]].is_required())
    nearest = [".".join([*parents, name]) for name in difflib.get_close_matches(key, known, n=1)]
    meant = elsewhere or nearest
    if meant:
        return f"; did you mean {listed([repr(path) for path in meant], 'or')}?"
    return f"; known keys are {', '.join(known)}"


def _keys_at(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """Return the keys of the section to which ``parents`` lead."""
    for name in parents:
        field = _fields(model).get(name)
        inner = None if field is None else section_of(field.annotation)
        model = inner or model
    return sorted(model.model_fields)


def _paths(model: type[BaseModel]) -> Iterator[str]:
    """Yield the keys of all sections inside a configuration, with the place 0 for each list on the way."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            start = f"{name}.0" if get_origin(_bare(field.annotation)) is tuple else name
            for key in section.model_fields:
                yield f"{start}.{key}"
            yield from (f"{start}.{path}" for path in _paths(section))
