"""Curves of covariate shift: the same input gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.support.errors import DdilError
from ddil_eval.report import figures
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


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        DdilError, match=r"^No record of a covariate-shift analysis can be drawn in .+a\.png: run `ddil eval"
    ):
        figures.shift_curves([system("PD", 4)], tmp_path / "a.png")
