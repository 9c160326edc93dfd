"""Where files are: those that ship beside the code, protocols and the paper's numbers, and the user's own folder."""

from __future__ import annotations

import os
import sys
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


def user_folder() -> Path:
    """``DDIL_CACHE``, or ``ddil`` in the user's cache folder; it need not exist."""
    named = os.environ.get("DDIL_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ddil"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ddil"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddil"
