"""``ddil models``, ``ddil data`` and ``ddil metrics``: the lists, and what to do about missing files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ddil_core.data.datasets import DATASETS
from ddil_eval.cli.listing import _word, show_list
from ddil_eval.metrics import METRICS


def rows_of(result: Result) -> dict[str, dict[str, object]]:
    assert (result.exit_code, result.stderr) == (0, "")
    return {row["name"]: row for row in json.loads(result.stdout)}


def test_the_shapes_teacher_is_listed_as_here_or_not(cli: Callable[..., Result], root: Path) -> None:
    row = rows_of(cli("models", "--json"))["shapes"]
    assert row["here"] is (root / "ddil_core/shapes/weights/teacher/model_index.json").is_file()


def test_the_shapes_pictures_need_nothing(cli: Callable[..., Result]) -> None:
    row = rows_of(cli("data", "--json"))["shapes"]
    assert (row["here"], row["needs"]) == (True, "")


def test_the_data_sets_say_what_they_are_for(cli: Callable[..., Result]) -> None:
    rows = rows_of(cli("data", "--json"))
    assert {name: row["use"] for name, row in rows.items() if row["use"] != "training, evaluation"} == {
        "webdataset:PATTERN": "training"
    }
    assert list(rows) == [kind.form for kind in DATASETS.values()]
    assert all(row["needs"] for name, row in rows.items() if name != "shapes")


def test_every_metric_is_listed_with_its_direction(cli: Callable[..., Result]) -> None:
    rows = rows_of(cli("metrics", "--json"))
    assert {name: row["direction"] for name, row in rows.items()} == {
        name: metric.direction for name, metric in METRICS.items()
    }
    assert [name for name, row in rows.items() if row["here"] == bool(row["missing"])] == []


@pytest.mark.parametrize("command", ["models", "data", "metrics"])
def test_the_table_shows_every_name(command: str, cli: Callable[..., Result]) -> None:
    names = rows_of(cli(command, "--json"))
    table = cli(command)
    assert table.exit_code == 0
    shown = "".join(line.split("│")[1].strip() for line in table.stdout.splitlines() if line.startswith("│"))
    assert shown == "".join(names)


def test_what_is_not_here_is_followed_by_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": "a", "here": True, "needs": "nothing"},
        {"name": "b", "here": False, "needs": "put it in DIR"},
        {"name": "c", "here": False, "needs": "weights", "missing": "weights: run X"},
    ]
    show_list("Things", ("name", "here"), rows, as_json=False)
    assert capsys.readouterr().out.splitlines()[-2:] == ["b: put it in DIR", "c: weights: run X"]


def test_words() -> None:
    assert [_word(value) for value in (True, False, None, "", 0, 1, "a")] == ["yes", "no", "–", "–", "0", "1", "a"]
