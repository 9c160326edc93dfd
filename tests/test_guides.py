"""The code of README and docs/python.md runs as doctests, and each script in ``examples`` runs."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.weights


@pytest.fixture
def desk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the committed results in it, where guides and scripts write."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "shapes").symlink_to(root / "results" / "shapes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("guide", ["README.md", "docs/python.md"])
def test_the_code_of_a_guide_runs(guide: str, root: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    results = doctest.testfile(str(root / guide), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 4
    assert results.failed == 0


def run(script: str, desk: Path, root: Path, *options: str) -> str:
    """Run a script of ``examples`` and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "examples" / script), *options]
    result = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_example_compares_a_student(desk: Path, root: Path) -> None:
    student = str(root / "ddil_core" / "shapes" / "weights" / "teacher")  # the teacher again, under another name
    printed = run("compare_a_student.py", desk, root, "--student", student, "--num-prompts", "8", "--out", "out")
    assert len(printed.splitlines()) >= 3 and "drawn_right_low" in printed
    assert (desk / "out" / "student.png").is_file()


def test_an_example_rolls_out_a_string(desk: Path, root: Path) -> None:
    assert run("roll_out_a_string.py", desk, root, "--student", "shapes") == "rollouts.png: TTTT | TTSS | SSTT | SSSS\n"
    assert (desk / "rollouts.png").is_file()


def test_an_example_adds_a_metric(desk: Path, root: Path) -> None:
    printed = run("add_a_metric.py", desk, root, "--num-prompts", "8")
    assert printed.startswith("standard deviation of an image's values: 0.")
