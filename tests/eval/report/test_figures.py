"""Curves of covariate shift: the same input gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.support.errors import DdilError
from ddil_eval.report import figures, paper_figures, tables
from ddil_eval.report.records import read_records
from tests.eval.report.pages import everything
from tests.records import p_teacher, record, system


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_curves_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    records = [p_teacher(p, fd=20 - 5 * p) for p in (0.8, 0.6, 0.4, 0.2)]
    records += [record({"kind": "teacher_then_student", "switch_t": t}) for t in (749, 500, 250)]
    records += [record({"kind": "pure", "model": model}) for model in ("teacher", "student")]
    first, second = (figures.shift_curves(records, tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    colours = {tuple(colour) for colour in pixels(first).reshape(-1, 3)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x44, 0x44, 0x44)} <= colours  # teacher, student, mixed


def test_figures_for_a_paper_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Every figure, of a folder with every kind of record, as PDF and as PNG."""
    records = read_records(everything(tmp_path / "results"))
    first, second = (
        {
            path.name: path.read_bytes()
            for path in paper_figures.draw_all(tables.groups(records), tables.build(records), out)
        }
        for out in (tmp_path / "a", tmp_path / "b")
    )
    assert first == second and set(first) == {
        f"{name}{suffix}" for name in paper_figures.DRAWN for suffix in (".pdf", ".png")
    }
    assert all(content.startswith(b"%PDF" if name.endswith(".pdf") else b"\x89PNG") for name, content in first.items())


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        DdilError, match=r"^No record of a covariate-shift analysis can be drawn in .+a\.png: run `ddil eval"
    ):
        figures.shift_curves([system("PD", 4)], tmp_path / "a.png")
