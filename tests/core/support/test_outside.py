"""Files from outside are read within limits: each that passes one gives a sentence, and no pipe is waited for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_core.support.outside import DEPTH, NotPlain, inside, parse_json, read_file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(JSON)
def test_what_is_written_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.binary(max_size=24) | st.text('[]{}",:\\\\ud80019eE+-.nulltrfase ', max_size=24).map(str.encode))
def test_any_content_is_read_or_refused(content: bytes) -> None:
    try:
        json.dumps(parse_json(content))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, f"is nested more than {DEPTH} levels deep"),
        ('{"a": ' * 100_000, f"is nested more than {DEPTH} levels deep"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"is nested more than {DEPTH} levels deep"),
        ("[" + "[]," * 2_000_000 + "0]", "holds more than 2,000,000 values"),
        ("9" * 5_000, "holds a number of 5,000 digits"),
        ('{"a": ["\\ud83d\\ude00", "\\ud83d"]}', "holds half of a surrogate pair, which is no character"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "has an object with the key 'c' twice"),
    ],
    ids=["lists", "objects", "just too deep", "values", "digits", "half", "twice"],
)
def test_json_that_passes_a_limit(text: str, sentence: str) -> None:
    with pytest.raises(NotPlain) as error:
        parse_json(text)
    assert str(error.value) == sentence


def test_json_at_the_limit_of_the_depth() -> None:
    assert parse_json("[" * DEPTH + "]" * DEPTH)


def test_files_that_are_no_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises((NotPlain, OSError)):
            read_file(path, 100)
    (tmp_path / "file").write_bytes(b"x" * 101)
    with pytest.raises(NotPlain, match="^is larger than 0.0001 MB$"):
        read_file(tmp_path / "file", 100)
    assert read_file(tmp_path / "file", 101) == b"x" * 101


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("a.png", True), ("a/b.png", True), ("a/..b", True), ("../a", False), ("a/../../b", False), ("/etc/passwd", False),
        ("..", False), ("a\\..\\b", False),
    ],
)  # fmt: skip
def test_names_that_stay_in_their_folder(name: str, stays: bool) -> None:
    assert inside(name) == stays
