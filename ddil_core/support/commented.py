"""Write a configuration as a complete YAML protocol in which a comment explains each key."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import yaml
from pydantic import BaseModel

from ddil_core.support.keys import Key, keys

WIDTH = 110
INDENT = "  "


def commented(config: BaseModel, head: str = "") -> str:
    """Return a protocol that gives this configuration again. ``head`` is a comment at its start."""
    return "".join(line + "\n" for line in [*_comment(head, ""), *_lines(config, "")])


def _lines(config: BaseModel, indent: str) -> Iterator[str]:
    for key in keys(type(config)):
        value = getattr(config, key.name)
        yield from _comment(_explained(key), indent)
        if isinstance(value, BaseModel):
            yield f"{indent}{key.name}:"
            yield from _lines(value, indent + INDENT)
        elif isinstance(value, tuple) and value and all(isinstance(item, BaseModel) for item in value):
            yield f"{indent}{key.name}:"
            yield from (f"{indent}{INDENT}- {_plain(item)}" for item in value)
        else:
            yield f"{indent}{key.name}: {_plain(value)}"


def _explained(key: Key) -> str:
    """Return the comment of a key: its meaning, and what it takes."""
    return f"{key.meaning} It takes {key.takes}.".replace("``", "").strip()


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)]


def _plain(value: object) -> str:
    """Write a value as YAML in one line."""
    if isinstance(value, BaseModel):
        value = {name: _content(item) for name, item in value}
    text = yaml.safe_dump(_content(value), default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _content(value: object) -> object:
    if isinstance(value, BaseModel):
        return {name: _content(item) for name, item in value}
    if isinstance(value, tuple | list):
        return [_content(item) for item in value]
    if isinstance(value, dict):
        return {name: _content(item) for name, item in value.items()}
    return value
