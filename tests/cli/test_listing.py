"""``ddil models``, ``ddil data`` and ``ddil metrics``: the lists, and what to do about missing files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ddil_core.data.datasets import DATASETS
from ddil_eval.cli.listing import _word, print_table, show_list
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
    assert all(row["needs"] for name, row in rows.items() if name not in ("shapes", "gaussians"))


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


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_list_breaks_no_word(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a text between spaces and signs stands whole, in a table or in paragraphs that fit the width."""
    monkeypatch.setenv("COLUMNS", str(width))
    rows: list[dict[str, object]] = [
        {
            "name": "sd15",
            "source": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "licence": "unverified",
            "here": True,
        },
        {
            "name": "lcm",
            "source": "SimianLuo/LCM_Dreamshaper_v7 and a long explanation",
            "licence": None,
            "here": False,
        },
    ]
    print_table("Models", ("name", "source", "licence", "here"), rows)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    for row in rows:
        for text in map(_word, row.values()):
            for part in re.findall(r"[^\s/_-]+[/_-]*", text):
                assert part in shown
    assert ("┃" in shown) == (width >= 60)


def test_a_list_for_a_very_narrow_terminal_is_paragraphs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "25")
    print_table(
        "Models", ("name", "source", "here"), [{"name": "sd15", "source": "stabilityai/sd-turbo", "here": None}]
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("Models") and lines[1:] == [
        "",
        "sd15",
        "  source: stabilityai/sd-",
        "  turbo",
        "  here: –",
    ]


@pytest.mark.parametrize("given", ["fid=absent.pt", "fid=", "fid", "none=absent.pt"])
def test_weights_that_are_not_there_are_a_wrong_command(given: str, cli: Callable[..., Result]) -> None:
    result = cli("metrics", "--add", given)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
