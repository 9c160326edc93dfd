"""The user's folder: weights of metrics that were fetched on command, and reference features that were computed once."""

from __future__ import annotations

from pathlib import Path

from ddil_core.resources import user_folder

__all__ = ["references_folder", "user_folder", "weights_folder"]


def weights_folder() -> Path:
    """Where weights of metrics lie."""
    return user_folder() / "weights"


def references_folder() -> Path:
    """Where features of reference pictures lie, each under the hash of what it depends on."""
    return user_folder() / "references"
