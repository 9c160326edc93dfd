"""A data set that a package outside the project adds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ddil_core.data.datasets import DATASETS

CODE = """
from ddil_core.data.datasets import DataSetKind
from ddil_core.data.shapes import ShapesData


class Toy(ShapesData):
    def __init__(self, reference):
        self.reference = reference


KIND = DataSetKind(
    name="toy",
    form="toy:NUMBER",
    use="training, evaluation",
    description="the shapes world under another name",
    source="a test",
    needs="a number",
    open=lambda reference, download: Toy(reference),
)
"""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str = CODE) -> None:
    """Install a package into ``folder`` that adds a data set by an entry point."""
    info = folder / "toy_data-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddil.datasets]\ntoy = toy_data:KIND\n")
    (folder / "toy_data.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "toy_data", raising=False)
    monkeypatch.setattr(DATASETS, "_added", None)
