"""Plain YAML: values are read back as they were written, and everything else gives one sentence with its line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_core.support.errors import WrongCommand
from ddil_core.support.plain_yaml import DEPTH, VALUES, NotPlain, load_plain
from ddil_core.support.protocol import override, read_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=12
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.dictionaries(TEXTS, PLAIN, max_size=4))
def test_what_is_written_comes_back(content: dict[str, Any]) -> None:
    assert load_plain(yaml.safe_dump(content)) == content
    assert load_plain(yaml.safe_dump(content, default_flow_style=True)) == content


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(st.sampled_from("ab1:-?&*!<>=[]{},#|%@`'\"\\ \n\t.~0") | st.characters(), max_size=24))
def test_any_text_is_read_or_refused_in_one_sentence(text: str) -> None:
    """A value of a protocol raises nothing but a sentence."""
    try:
        override({"systems": [{"steps": 1}]}, [f"x={text}"])
    except WrongCommand as error:
        assert str(error).startswith("--set ") and "\n" not in str(error)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(content=st.binary(max_size=24))
def test_any_file_is_read_or_refused_in_one_sentence(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_yaml(path), dict)
    except WrongCommand as error:
        assert str(error).startswith(f"the protocol {path} ") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 2020-99-99", "holds a date in line 1; put a text into quotes"),
        ("a: 1\nb: 2020-01-01", "holds a date in line 2; put a text into quotes"),
        ("a: !!set {x, y}", "holds a set in line 1; write lists, mappings, texts and numbers alone"),
        ("a: !!binary aGk=", "holds binary data in line 1; put a text into quotes"),
        ("a: !mine x", "holds a value of the kind '!mine' in line 1; put a text into quotes"),
        ("a: !!int x", "holds a number that cannot be read in line 1"),
        ("a: " + "9" * 5000, "holds a number that cannot be read in line 1"),
        (f"a: {2**63}", "holds a number that is larger than 2^63 in line 1"),
        ("a: 1\nb: 2\na: 3", "holds the key 'a' twice in line 3; leave one out"),
        ("1: a", "holds a key that is no text in line 1; put it into quotes"),
        ("? [a]\n: b", "holds a key that is no text in line 1; put it into quotes"),
        ('a: "\\ud800"', "holds half of a surrogate pair, which is no character in line 1"),
        ("a: &a [*a]", f"is nested more than {DEPTH} levels deep, or contains itself in line 1"),
        ("[" * 5000, f"is nested more than {DEPTH} levels deep in line 1"),
        ("{a: " * 5000, f"is nested more than {DEPTH} levels deep in line 1"),
        ("<<: 3", "merges something that is no mapping in line 1"),
    ],
)
def test_what_is_not_plain(text: str, sentence: str) -> None:
    with pytest.raises(NotPlain) as error:
        load_plain(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("first", "after"), [("[x, x]", "&a{0} [{1}]"), ("{x: 1}", "&a{0} {{<<: [{1}]}}"), ("[x]", "&a{0} {{b: [{1}]}}")]
)
def test_aliases_do_not_grow_without_bound(first: str, after: str) -> None:
    """Each line repeats the line before ten times: 10^12 values in 600 characters."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: " + after.format(n, ", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 13)]
    start = time.process_time()
    with pytest.raises(NotPlain, match=f"^holds more than {VALUES:,} values"):
        load_plain("\n".join(lines))
    assert time.process_time() - start < 5


def test_aliases_and_merges_are_copies() -> None:
    read = load_plain("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\nd: {<<: [{x: 4}, *a]}")
    assert read["b"] == {"x": 1, "y": [2]} and read["c"] == {"x": 3, "y": [2]} and read["d"] == {"x": 4, "y": [2]}
    assert read["a"] is not read["b"] and read["a"]["y"] is not read["c"]["y"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: \xff", "is not UTF-8 text: invalid start byte at byte 3"),
        ("a: 1".encode("utf-16"), "is not UTF-8 text: invalid start byte at byte 0"),
        (b"a:\tb: c\n", "is not YAML: "),
        (b"a: 1\n---\nb: 2\n", "is not YAML: expected a single document"),
        (b"a: \0", "is not YAML: unacceptable character"),
        (b"method: !!python/object/apply:os.system [id]", "holds a value of the kind "),
    ],
)
def test_files_of_other_encodings_and_kinds(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    with pytest.raises(WrongCommand) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"the protocol {path} {sentence}")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("seed: 3\n", encoding="utf-8-sig")
    assert read_yaml(path) == {"seed": 3}


def test_a_key_that_goes_too_deep() -> None:
    key = ".".join("a" * 2000)
    with pytest.raises(
        WrongCommand, match=r"^--set 'a\.a.*' names no place|^--set 'a\.a.* characters\) names no place"
    ):
        override({}, [f"{key}=1"])
