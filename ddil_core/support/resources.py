"""The folders of the shipped files (protocols, the paper's numbers), and the user's folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from ddil_core.support.errors import DdilError
from ddil_core.support.paths import user_path

_PACKAGE = Path(__file__).resolve().parents[1]


def protocols() -> Path:
    """Return the folder of the shipped protocols (YAML). Raises DdilError if the folder does not exist."""
    return _shipped("protocols", checkout="protocols")


def find_protocol(path: Path) -> Path:
    """Return a protocol's file: ``path``, or the shipped protocol of that name where there is no such file.

    A shipped protocol is named as in a checkout: ``protocols/shapes/pd.yaml``, or ``shapes/pd.yaml``.
    """
    parts = path.parts[1:] if path.parts[:1] == ("protocols",) else path.parts
    if path.exists() or path.is_absolute() or not parts or ".." in parts:
        return path
    shipped = protocols().joinpath(*parts)
    return shipped if shipped.is_file() else path


def paper_results() -> Path:
    """Return the folder of the paper's tables, ``table1.csv`` … ``table5.csv``.

    Raises DdilError if it does not exist.
    """
    return _shipped("paper", checkout="results/paper")


def _shipped(name: str, *, checkout: str) -> Path:
    """Return the folder in the installed package, or else the folder at the root of the checkout."""
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / checkout):
        if folder.is_dir():
            return folder
    raise DdilError(
        f"The folder {checkout}/ that ships with ddil is neither in {_PACKAGE / '_data'} nor in {_PACKAGE.parent}: "
        "install ddil again, from its wheel or from a whole checkout."
    )


def user_folder() -> Path:
    """Return ``DDIL_CACHE``, or else ``ddil`` in the user's cache folder. The folder need not exist.

    Raises:
        DdilError: the user has no home folder and ``DDIL_CACHE`` is not set.
        WrongCommand: ``DDIL_CACHE`` cannot be a folder's path.
    """
    if folder := os.environ.get("DDIL_CACHE"):
        return user_path(folder, "the folder of DDIL_CACHE")
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ddil"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "ddil"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddil"
    except RuntimeError as error:
        raise DdilError("this user has no home folder to keep files in; set DDIL_CACHE to a folder") from error


def require_cache() -> None:
    """Make the user's folder and try a file in it. Call this before work that keeps its result there.

    Raises:
        DdilError: the folder cannot be made, or is not writable.
    """
    folder = user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DdilError(
            f"files cannot be kept in {folder} ({error.strerror}); make it writable, or set DDIL_CACHE to another "
            "folder"
        ) from error
