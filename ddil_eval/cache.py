"""The user's folder: weights of metrics that were fetched on command, and reference features that were computed once."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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


def weights_folder() -> Path:
    """Where weights of metrics lie."""
    return user_folder() / "weights"


def references_folder() -> Path:
    """Where features of reference pictures lie, each under the hash of what it depends on."""
    return user_folder() / "references"
