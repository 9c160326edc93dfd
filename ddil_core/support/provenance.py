"""The versions of the packages and the commit of the code, for records and runs."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("ddil", "torch", "diffusers", "transformers", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of the packages on which numbers depend."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def commit() -> str | None:
    """Return the commit of the checkout, with ``-dirty`` where files differ from it. None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
