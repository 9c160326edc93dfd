"""Where files are: those that ship beside the code, protocols and the paper's numbers, and the user's own folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from ddil_core.support.errors import DdilError
from ddil_core.support.paths import user_path

_PACKAGE = Path(__file__).resolve().parents[1]


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
    """``DDIL_CACHE``, or ``ddil`` in the user's cache folder; it need not exist.

    Raises:
        DdilError: the user has no home folder and ``DDIL_CACHE`` is not set.
        WrongCommand: ``DDIL_CACHE`` cannot be a folder's path.
    """
    named = os.environ.get("DDIL_CACHE")
    if named:
        return user_path(named, "the folder of DDIL_CACHE")
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ddil"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "ddil"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddil"
    except RuntimeError as error:
        raise DdilError("this user has no home folder to keep files in; set DDIL_CACHE to a folder") from error


def require_cache() -> None:
    """Make the user's folder, and try a file in it; to be called before work whose result is kept there.

    Raises:
        DdilError: it cannot be made, or takes no files.
    """
    folder = user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DdilError(
            f"files cannot be kept in {folder} ({error.strerror}); make it writable, or set DDIL_CACHE to another folder"
        ) from error
