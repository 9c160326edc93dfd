"""The short form: a few kills of one command, and one damage of each kind. ``make faults`` is the long form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


ROWS = {
    "kill -9 of `distill pd with DDIL`": "| 2 | the same result |",
    "SIGTERM of `distill pd with DDIL`": "| 1 | the same result |",
    "a flipped bit in each file: a killed run": "| 4 | ",  # which files there are depends on the moment of the kill
    "a cut in each file: a folder of images": "| 4 | refused in a sentence |",
}


def test_a_fault_changes_no_result(root: Path) -> None:
    asked = [word for fault in ROWS for word in ("--only", fault)]
    words = ("--moments", "2", "--signals", "1", "--disks", "0", "--times", "1", "--files", "4", *asked)
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    for fault, outcome in ROWS.items():
        assert f"| {fault} {outcome}" in done.stdout, done.stdout
