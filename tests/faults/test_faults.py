"""The short form: a few kills of one command, and one damage of each kind. ``make faults`` is the long form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def test_kills_and_damage_change_no_student(root: Path) -> None:
    words = ("--moments", "2", "--times", "1", "--files", "4", "--only", "distill pd with DDIL")
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "| kill -9 of `distill pd with DDIL` | 2 | the same bytes |" in done.stdout
    assert done.stdout.count("refused in a sentence") == 4
