"""Read plain YAML: mappings with text keys, lists, texts, numbers, booleans and null.

Everything else is refused, with its line: dates, sets, binary data, tags, repeated keys, values that contain
themselves, and documents that grow without bound through aliases. Depth and size are limited.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ddil_core.support.outside import NotPlain, read_file

DEPTH = 32
"""The deepest nesting of lists and mappings."""

VALUES = 100_000
"""The most values in a document. An alias counts for all values that it stands for."""

CHARACTERS = 1_000_000
"""The longest text."""

_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}
_KINDS = {"timestamp": "a date", "binary": "binary data", "set": "a set", "omap": "an ordered map", "pairs": "pairs"}
_MERGE = "tag:yaml.org,2002:merge"
_LARGEST = 2**63 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_plain(text: str) -> Any:
    """Return the value of a YAML text, None for an empty text. Every alias becomes a copy.

    Raises:
        yaml.YAMLError: the text is not YAML.
        NotPlain: the text is YAML, but not plain.
    """
    if len(text) > CHARACTERS:
        raise NotPlain(f"is longer than {CHARACTERS:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _Reader(loader).value(node)
    finally:
        loader.dispose()


def load_plain_file(path: Path) -> Any:
    """Return the value of a YAML file in UTF-8, as :func:`load_plain` does.

    Raises:
        OSError: the file cannot be read.
        NotPlain: the file is too large, is no regular file, or is not plain YAML in UTF-8.
    """
    try:
        return load_plain(read_file(path, 4 * CHARACTERS).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NotPlain(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise NotPlain(f"is not YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with limits on depth and nodes, which it reaches before Python's stack or the memory is full."""

    depth = nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.nodes > 2 * VALUES:  # the keys of mappings are nodes, too
            raise NotPlain(f"holds more than {VALUES:,} values")
        if self.depth > DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise NotPlain(f"is nested more than {DEPTH} levels deep{_line(mark)}")
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Turns nodes into values, and counts them."""

    def __init__(self, loader: _Loader) -> None:
        self.loader, self.count = loader, 0

    def value(self, node: Node, depth: int = 1) -> Any:
        """Return the value of a node at a depth, and check all nodes below it."""
        place = _line(node.start_mark)
        self._count()
        if depth > DEPTH:  # only an alias can be deeper than the composed nodes
            raise NotPlain(f"is nested more than {DEPTH} levels deep, or contains itself{place}")
        if isinstance(node, ScalarNode):
            return self._scalar(node, place)
        if isinstance(node, SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, depth)
        raise NotPlain(f"holds {_kind(node.tag)}{place}; write lists, mappings, texts and numbers alone")

    def _scalar(self, node: ScalarNode, place: str) -> Any:
        if node.tag not in _PLAIN:
            raise NotPlain(f"holds {_kind(node.tag)}{place}; put a text into quotes")
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError) as error:  # the tag does not fit, as in !!int "a", or the number is too long
            raise NotPlain(f"holds a number that cannot be read{place}") from error
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise NotPlain(f"holds a number that is larger than 2^63{place}")
        if isinstance(value, str) and _SURROGATE.search(value):
            raise NotPlain(f"holds half of a surrogate pair, which is no character{place}")
        return value

    def _mapping(self, node: MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _line(key_node.start_mark)
            if key_node.tag == _MERGE:
                for part in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
                    if not isinstance(part, MappingNode):
                        raise NotPlain(f"merges something that is no mapping{place}")
                    merged = self.value(part, depth + 1) | merged  # of several mappings the first counts
                continue
            key = self.value(key_node, depth + 1)
            if not isinstance(key, str):
                raise NotPlain(f"holds a key that is no text{place}; put it into quotes")
            if key in own:
                raise NotPlain(f"holds the key {key[:60]!r} twice{place}; leave one out")
            own[key] = self.value(value_node, depth + 1)
        return merged | own

    def _count(self) -> None:
        self.count += 1
        if self.count > VALUES:
            raise NotPlain(f"holds more than {VALUES:,} values, counting what its aliases stand for")


def _line(mark: Any) -> str:
    return f" in line {mark.line + 1}"


def _kind(tag: str) -> str:
    """Describe the kind of a value by its YAML tag."""
    name = tag.removeprefix("tag:yaml.org,2002:")
    return _KINDS.get(name, f"a value of the kind {tag[:60]!r}")
