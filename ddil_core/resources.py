"""Where the files that ship beside the code are: protocols and the paper's numbers."""

from __future__ import annotations

from pathlib import Path

from ddil_core.errors import DdilError

_PACKAGE = Path(__file__).resolve().parent


def protocols() -> Path:
    """The folder of the shipped protocols (YAML). Raises DdilError if it is nowhere."""
    return _shipped("protocols", checkout="protocols")


def paper_results() -> Path:
    """The folder of the paper's reported tables, `table1.csv` … `table5.csv`. Raises DdilError if it is nowhere."""
    return _shipped("paper", checkout="results/paper")


def _shipped(name: str, *, checkout: str) -> Path:
    """The copy that the wheel installed, else the one at the root of the checkout."""
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / checkout):
        if folder.is_dir():
            return folder
    raise DdilError(
        f"The folder {checkout}/ that ships with ddil is neither in {_PACKAGE / '_data'} nor in {_PACKAGE.parent}: "
        "install ddil again, from its wheel or from a whole checkout."
    )
