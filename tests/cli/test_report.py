"""``ddil report``: tables on stdout, messages on stderr, files in the named folder, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ddil_eval.report import records as store
from tests.records import p_teacher, record, system

Cli = Callable[..., Result]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for kept in (p_teacher(0.8), record({"kind": "pure", "model": "teacher"}), system("PD", 4)):
        store.save_record(kept, folder / "shapes")
    return folder


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_it_prints_tables_on_stdout_and_messages_on_stderr(cli: Cli, results: Path) -> None:
    result = cli("report", "--results", results)
    assert result.exit_code == 0
    titles = [line for line in result.stdout.splitlines() if line.startswith(("Pure", "Table", "Systems"))]
    assert [title.split(".")[0] for title in titles] == [
        "Systems", "Pure runs", "Table 2", "Table 3", "Table 4",
    ]  # fmt: skip
    assert (
        "Not measured: p_teacher = 0.6: no record; p_teacher = 0.4: no record; p_teacher = 0.2: no record."
        in result.stdout
    )
    assert result.stderr == "Cells that were not measured, named below their tables: 10.\n"
    assert not (results / "report").exists()


def test_it_writes_the_files_that_it_names(cli: Cli, results: Path, tmp_path: Path) -> None:
    result = cli("report", "--results", results, "--csv", "--latex", "--figures", "--out", tmp_path / "out")
    files = {line.removeprefix("wrote ") for line in result.stderr.splitlines() if line.startswith("wrote ")}
    assert files == {str(tmp_path / "out" / name) for name in written(tmp_path / "out")}
    tables = ("pure", "systems", "table2", "table3", "table4")
    expected = {f"{table}.{suffix}" for table in tables for suffix in ("csv", "tex")}
    expected |= {f"{figure}.{suffix}" for figure in ("shift", "systems") for suffix in ("pdf", "png")}
    assert {Path(name).name for name in files} == expected and len(files) == len(expected)


def test_two_runs_write_the_same_files(cli: Cli, results: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]
    for out in runs:
        assert cli("report", "--results", results, "--csv", "--latex", "--figures", "--out", out).exit_code == 0
    assert written(runs[0]) == written(runs[1]) != {}


def test_files_go_to_report_in_the_results_unless_told(cli: Cli, results: Path) -> None:
    assert cli("report", "--results", results, "--csv").exit_code == 0
    assert len(list((results / "report").rglob("table2.csv"))) == 1
    assert cli("report", "--results", results).exit_code == 0  # what it wrote is not taken for records


def test_json_is_one_document(cli: Cli, results: Path) -> None:
    result = cli("report", "--results", results, "--json", "--csv")
    document = json.loads(result.stdout)
    assert (document["records"], document["replaced"], len(document["files"])) == (3, 0, 5)
    table = next(table for table in document["tables"] if table["name"] == "table2")
    assert table["rows"][0]["fd_efflite0_low"] == 12.0 and table["rows"][1]["fd_efflite0"] is None
    assert table["missing"] == [f"p_teacher = {p}: no record" for p in (0.6, 0.4, 0.2)]


def test_replaced_records_are_told(cli: Cli, results: Path) -> None:
    store.save_record(p_teacher(0.8, fd=9.0, created="2027-01-01T00:00:00+00:00"), results)
    result = cli("report", "--results", results)
    assert "Older records that newer records replace, not shown: 1.\n" in result.stderr
    assert "9.00" in result.stdout and "12.50" not in result.stdout.split("Table 2")[1].split("Table 3")[0]


@pytest.mark.parametrize(("save", "what"), [(False, "no records"), (True, "records, but none for a table,")])
def test_nothing_to_report_is_one_sentence(cli: Cli, tmp_path: Path, save: bool, what: str) -> None:
    if save:
        store.save_record(p_teacher(0.8, experiment="coco"), tmp_path)
    result = cli("report", "--results", tmp_path)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == (
        f"error: There are {what} in {tmp_path}: run `ddil eval covariate-shift`, or name another --results.\n"
    )


def test_a_damaged_record_is_one_sentence(cli: Cli, results: Path) -> None:
    path = next(results.rglob("covariate-shift-pure*.json"))
    path.write_text("{}")
    result = cli("report", "--results", results)
    assert result.exit_code == 1 and "Systems. Systems on" in result.stdout  # the others are shown
    assert result.stderr.splitlines()[-1] + "\n" == (
        f"error: The record {path} is damaged (experiment: Field required): "
        "move it away and run its measurement again.\n"
    )


def test_it_needs_no_torch(results: Path, root: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # any import of torch now fails
        "from ddil_eval.cli import ddil\n"
        f"ddil(['report', '--results', {str(results)!r}, '--csv', '--latex', '--figures', '--html'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_of_nothing_are_said(cli: Cli, tmp_path: Path) -> None:
    """There are tables, but no record of systems with their cost, of covariate shift or of drift."""
    store.save_record(record({"kind": "inverter", "name": "ph2p"}, experiment="prompt-inversion"), tmp_path)
    result = cli("report", "--results", tmp_path, "--figures")
    assert result.exit_code == 0 and "Inverters" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        f"No figure: --figures draws systems with their NFE, covariate shift and drift, and {tmp_path} has none."
    )
    assert "No figure" not in cli("report", "--results", tmp_path).stderr


def test_html_is_one_file_beside_the_tables(cli: Cli, results: Path) -> None:
    result = cli("report", "--results", results, "--html", "--json")
    page = results / "report" / "index.html"
    assert json.loads(result.stdout)["files"] == [str(page)] and list(written(results / "report")) == ["index.html"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
