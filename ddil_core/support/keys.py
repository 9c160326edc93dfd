"""The keys of a configuration in words: what each takes, its default, and its meaning from the class's docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ddil_core.support.text import listed


@dataclass(frozen=True)
class Takes:
    """Metadata of a type with a validator of its own: what it takes, in words."""

    words: str


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: Its name in protocols.
        takes: What it takes, in words, as in "a whole number of at least 1".
        required: Whether it has no default.
        default: Its default, as plain values.
        meaning: What it does: sentences of the docstring of its class.
        section: The class of the configuration that it holds, alone, in a list or by name; None for plain values.
    """

    name: str
    takes: str
    required: bool
    default: Any
    meaning: str
    section: type[BaseModel] | None


def keys(model: type[BaseModel]) -> list[Key]:
    """Return the keys of a configuration class, in the order of its fields."""
    meanings = attributes(model)
    return [
        Key(
            name,
            field_takes(field),
            field.is_required(),
            None if field.is_required() else _plain(field.get_default(call_default_factory=True, validated_data={})),
            meanings.get(name, ""),
            section_of(field.annotation),
        )
        for name, field in model.model_fields.items()
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=False)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def attributes(model: type[BaseModel]) -> dict[str, str]:
    """Return the meanings under ``Attributes:`` in the docstrings of a class and its bases, the class's own first.

    Protocols write None as null, and so do the meanings.
    """
    found: dict[str, str] = {}
    for base in model.__mro__:
        _, heading, text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for name, meaning in re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE) if heading else ():
            found.setdefault(name, re.sub(r"\bNone\b", "null", " ".join(meaning.split())))
    return found


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the configuration class inside a type: of the value itself, or of the items of a list or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := section_of(part)) is not None), None)


def numeric(annotation: Any) -> bool:
    """Return whether a value is a number, or a number or null. Lists of numbers are not."""
    if get_origin(annotation) is Annotated:
        return numeric(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return any(numeric(part) for part in get_args(annotation))
    return annotation in (int, float)


def field_takes(field: FieldInfo) -> str:
    """Say in words what a field takes."""
    return takes(field.annotation, field.metadata)


def takes(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say in words what a type takes, with the bounds in its metadata.

    ``takes(int, [Ge(1)])`` is "a whole number of at least 1".
    """
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return takes(inner, [*more, *metadata])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [part for part in get_args(annotation) if part is not NoneType]
        parts = ["a number"] if set(kinds) == {int, float} else [takes(part, metadata) for part in kinds]
        return " or ".join(parts) + " (or null)" * (NoneType in get_args(annotation))
    if get_origin(annotation) is Literal:
        return listed([f"'{value}'" for value in get_args(annotation)], "or")
    own = next((item.words for item in metadata if isinstance(item, Takes)), None)
    if own is not None and _bound(metadata, "ge") is None:
        return own
    if annotation in (int, float):
        return _number(annotation, metadata)
    if get_origin(annotation) is tuple:
        return _list(get_args(annotation), metadata)
    if annotation is dict or get_origin(annotation) is dict:
        return " of ".join(filter(None, ["a mapping", _at_least(metadata, "key")]))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping of the keys {listed(list(annotation.model_fields), 'and')}"
    if annotation is str:
        return " of ".join(filter(None, ["a text", _at_least(metadata, "character")]))
    return "true or false" if annotation is bool else "a value"


def _number(kind: type, metadata: Sequence[Any]) -> str:
    """Say in words what a number may be, as in "a number from 0 to 1" or "a whole number of at least 4"."""
    noun = "a whole number" if kind is int else "a number"
    bounds = {name: f"{value:g}" for name in ("ge", "gt", "le", "lt") if (value := _bound(metadata, name)) is not None}
    if {"ge", "le"} <= bounds.keys():
        return f"{noun} from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "at most" if len(bounds) > 1 else "of at most", "lt": "below"}
    return " ".join([noun, " and ".join(f"{words[name]} {value}" for name, value in bounds.items())]).strip()


def _bound(metadata: Sequence[Any], name: str) -> Any:
    """Return a bound by pydantic's name for it, such as "ge"; None without that bound."""
    inner = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return next((value for item in inner if (value := getattr(item, name, None)) is not None), None)


def _list(items: Sequence[Any], metadata: Sequence[Any]) -> str:
    if items[-1] is not Ellipsis:
        return f"a list of {len(items)} values, each {takes(items[0])}"
    return f"a list of {_at_least(metadata, 'item') or 'items'}, each {takes(items[0])}"


def _at_least(metadata: Sequence[Any], noun: str) -> str:
    """Return "at least 2 items" for a least length of 2 and the noun "item"; "" without a least length."""
    least = _bound(metadata, "min_length")
    return f"at least {least} {noun}{'s' * (least > 1)}" if least else ""
