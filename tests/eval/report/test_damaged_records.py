"""Each damaged record is named, and hides no others. No table or figure fails on a valid record."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.cli import ddil
from ddil_eval.experiments.shift_runs import shift_runs
from ddil_eval.report import records as store
from ddil_eval.report.cells import MOST_TRANSITIONS
from tests.records import p_teacher, record, system

RECORDS = [
    p_teacher(0.8),
    record({"kind": "pure", "model": "teacher"}),
    record({"kind": "teacher_then_student", "switch_t": 749}),
    record({"kind": "string", "string": "TTSS"}),
    record({"kind": "effect", "transitions": [0, 2]}),
    system("PD", 4),
    system("LCM", 2),
    record({"kind": "difference", "name": "a − b", "of": ["a", "b"]}, experiment="systems", systems={}),
    record({"kind": "inverter", "name": "ph2p"}, experiment="prompt-inversion", systems={}),
]
DOCUMENTS = [json.loads(one.model_dump_json()) for one in RECORDS]


def places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*above, key)
        yield from places(one, (*above, key))


PLACES = [(number, place) for number, document in enumerate(DOCUMENTS) for place in places(document)]
VALUES = st.sampled_from(
    [
        None, True, 10**30, -1, 0, 1e308, -1e308, 5e-324, float("inf"), float("nan"), 2**63, "$x_{", "\\", "a\nb", "\0", "x" * 300,
        "", "..", "T" * 40, [], {}, [[]], {"name": []}, [0], [0, 1], [3, 99], [99999999],
    ]
) | st.floats() | st.text(st.characters(), max_size=6)  # fmt: skip
DAMAGE = st.tuples(st.sampled_from(PLACES), st.sampled_from(["change", "leave out"]), VALUES)


def damaged(changes: list[tuple[tuple[int, tuple[str | int, ...]], str, Any]]) -> list[Any]:
    """The documents with values changed or left out."""
    documents = json.loads(json.dumps(DOCUMENTS))
    for (number, (*above, last)), how, value in changes:
        inside = documents[number]
        try:
            for key in above:
                inside = inside[key]
            if how == "change":
                inside[last] = value
            else:
                del inside[last]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    return documents


@pytest.mark.parametrize(("option", "examples"), [("--csv", 10), ("--latex", 10), ("--json", 20), ("--figures", 3)])
def test_reports_of_mutated_records(option: str, examples: int, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()

    @settings(derandomize=True, deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.lists(DAMAGE, min_size=1, max_size=3))
    def check(changes: list[Any]) -> None:
        for number, document in enumerate(damaged(changes)):
            (folder / f"{number}.json").write_text(json.dumps(document))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = CliRunner().invoke(
                ddil,
                ["report", "--results", str(tmp_path), option, "--out", str(tmp_path / "out")],
                catch_exceptions=False,
            )
        said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code in (0, 1) and len(said) == result.exit_code
        bad = sum(f"The record {folder / str(number)}.json is damaged (" in "".join(said) for number in range(9))
        assert bad == min(len(store.sift(tmp_path)[1]), 3)
        if result.exit_code == 0 and option == "--json":
            json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    check()


CELLS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "p_teacher"}, "a cell of the kind 'p_teacher' needs 'p_teacher', a number"),
    ({"kind": "p_teacher", "p_teacher": "half"}, "'p_teacher' of a cell of the kind 'p_teacher' is a number, not 'half'"),
    ({"kind": "p_teacher", "p_teacher": True}, "'p_teacher' of a cell of the kind 'p_teacher' is a number, not 'True'"),
    ({"kind": "p_teacher", "p_teacher": None}, "'p_teacher' of a cell of the kind 'p_teacher' is a number, not 'None'"),
    ({"kind": "student_then_teacher", "switch_t": [749]},
     "'switch_t' of a cell of the kind 'student_then_teacher' is a number, not '[749]'"),
    ({"kind": "pure"}, "a cell of the kind 'pure' needs 'model', a text"),
    ({"kind": "string", "string": "TX"}, "'string' of a cell of the kind 'string' is 1 to 12 of the letters T and S, not 'TX'"),
    ({"kind": "string", "string": "T" * 40},
     f"'string' of a cell of the kind 'string' is 1 to 12 of the letters T and S, not '{'T' * 40}'"),
    ({"kind": "effect", "transitions": [0, 10**9]},
     "'transitions' of a cell of the kind 'effect' is a list of one or two places below 12, rising, not '[0, 1000000000]'"),
    ({"kind": "system", "steps": 4}, "a cell of the kind 'system' needs 'name', a text"),
    ({"kind": "system", "name": "PD", "steps": "4"}, "'steps' of a cell of the kind 'system' is a whole number from 1, not '4'"),
    ({"kind": "difference", "name": "a", "of": "a"}, "'of' of a cell of the kind 'difference' is a list of two texts, not 'a'"),
    ({"kind": "inverter"}, "a cell of the kind 'inverter' needs 'name', a text"),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "sentence"), CELLS)
def test_a_cell_that_places_nothing_is_damaged(cell: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = store.save_record(p_teacher(0.8), tmp_path)
    path.write_text(json.dumps(DOCUMENTS[0] | {"cell": cell}))
    with pytest.raises(DdilError) as error:
        store.read_records(tmp_path)
    assert str(error.value) == (
        f"The record {path} is damaged (cell: {sentence}): move it away and run its measurement again."
    )


def test_a_kind_without_tables_is_free() -> None:
    assert record({"kind": "mine", "p_teacher": "half"}).kind == "mine"


def test_a_damaged_record_does_not_hide_the_others(tmp_path: Path, cli: Callable[..., Result]) -> None:
    for rate in (0.8, 0.6, 0.4, 0.2, 0.1):
        store.save_record(p_teacher(rate), tmp_path)
    first, second, third, fourth, _ = sorted((tmp_path / "records").iterdir())
    first.write_text("{")
    result = cli("report", "--results", tmp_path, "--csv")
    assert result.exit_code == 1 and "Table 2" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        f"error: The record {first} is damaged (it is no JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)): move it away and run its measurement again."
    )
    (table,) = tmp_path.rglob("table2.csv")
    assert "\n0.6,12.5," in table.read_text()
    for path in (second, third, fourth):
        path.write_text("[]")
    last = cli("report", "--results", tmp_path).stderr.splitlines()[-1]
    assert last.count("move it away") == 3 and last.endswith("; and 1 more are damaged")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"null", b"[" * 10000, b'{"a": "\\ud800"}', b'{"kind": NaN}'])
def test_files_that_are_no_record(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "records" / "one.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DdilError, match=r"^The record .*/records/one\.json is damaged \(.*\): move it away"):
        store.read_records(tmp_path)


def test_strings_alone_have_tables_and_no_figure(tmp_path: Path, cli: Callable[..., Result]) -> None:
    store.save_record(record({"kind": "string", "string": "TTSS"}), tmp_path)
    result = cli("report", "--results", tmp_path, "--figures")
    assert result.exit_code == 0 and "Factorial" in result.stdout and list(tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize(("low", "high"), [(-1.7e308, 1.7e308), (0.0, 5e-324), (1e308, 1.1e308), (0.0, 0.0)])
@pytest.mark.parametrize("option", ["--latex", "--figures", "--json"])
def test_values_at_the_ends_of_the_floats(low: float, high: float, option: str, tmp_path: Path) -> None:
    extreme = {
        "fd_efflite0": {
            "estimate": {"value": high, "low": low, "high": high, "n": 4},
            "direction": "lower",
            "kind": "set",
        }
    }
    store.save_record(p_teacher(0.8, metrics=extreme), tmp_path)
    result = CliRunner().invoke(ddil, ["report", "--results", str(tmp_path), option], catch_exceptions=False)
    assert result.exit_code == 0 or (
        option == "--figures" and "is too large to draw in " in result.stderr.splitlines()[-1]
    )


def test_a_pipe_and_a_folder_in_the_place_of_records(tmp_path: Path) -> None:
    (tmp_path / "records" / "folder.json").mkdir(parents=True)
    os.mkfifo(tmp_path / "records" / "pipe.json")
    records, damage = store.sift(tmp_path)
    assert records == []
    assert [str(error) for error in damage] == [
        f"The record {tmp_path}/records/pipe.json is damaged (it is no regular file): move it away and run its measurement again."
    ]


def test_a_factorial_of_too_many_strings() -> None:
    grid = list(range(999, 999 - MOST_TRANSITIONS - 1, -1))
    with pytest.raises(
        WrongCommand, match=r"^the factorial of a student of 13 steps has 2\^13 strings, and at most 2\^12 "
    ):
        shift_runs((), (), True, grid, torch.zeros(0, 13))
