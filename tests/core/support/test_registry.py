"""Tables of rows by name, and rows that other packages add. Paths serve as rows, because a path has a name."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath

import pytest

from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.registry import Registry


def paths() -> Registry[PurePosixPath]:
    return Registry("path", "ddil.paths", PurePosixPath, [PurePosixPath("a/first"), PurePosixPath("a/second")])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package. ``install`` writes its module and its entry point."""
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_paths", raising=False)
    return tmp_path


def install(package: Path, code: str) -> None:
    (package / "toy_paths.py").write_text(f"from pathlib import PurePosixPath\n{code}\n")
    (package / "toy-1.0.dist-info" / "entry_points.txt").write_text("[ddil.paths]\ntoy = toy_paths:ROW\n")


def test_rows_come_by_name_and_in_their_order() -> None:
    table = paths()
    assert list(table) == ["first", "second"] and len(table) == 2
    assert table["second"] == table.find("second") == PurePosixPath("a/second")
    assert "third" not in table
    with pytest.raises(KeyError):
        table["third"]


def test_a_script_adds_a_row_of_a_new_name() -> None:
    table = paths()
    table.add(PurePosixPath("b/third"))
    assert list(table) == ["first", "second", "third"]
    with pytest.raises(DdilError, match="the path 'third' exists already; give the new one another name"):
        table.add(PurePosixPath("b/third"))


def test_a_wrong_name_is_one_sentence_with_the_nearest() -> None:
    with pytest.raises(WrongCommand) as error:
        paths().find("secnd")
    assert str(error.value) == ("the path 'secnd' is not known; it may be one of first, second; did you mean 'second'?")


def test_a_package_adds_a_row_by_an_entry_point(package: Path) -> None:
    install(package, "ROW = PurePosixPath('b/third')")
    table = paths()
    assert list(table) == ["first", "second", "third"] and len(table) == 3
    assert "third" in table and table.find("third") == PurePosixPath("b/third")


def test_own_rows_need_no_other_package(package: Path) -> None:
    install(package, "raise SystemExit")
    assert paths()["first"] == PurePosixPath("a/first")
    assert "toy_paths" not in sys.modules


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import absent_module", "cannot be imported (ModuleNotFoundError: No module named 'absent_module'); mend or"),
        ("ROW = 3", "is of the class int and not PurePosixPath; mend"),
        ("ROW = PurePosixPath('b/first')", "takes the name 'first', which exists already; give it another name"),
    ],
)
def test_a_broken_package_is_named(package: Path, code: str, sentence: str) -> None:
    install(package, code)
    table = paths()
    for _ in range(2):  # the second time too
        with pytest.raises(DdilError) as error:
            list(table)
        assert str(error.value).startswith("the entry point 'toy' (toy_paths:ROW) of the group 'ddil.paths' ")
        assert sentence in str(error.value)
