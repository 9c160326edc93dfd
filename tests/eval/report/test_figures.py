"""Curves of covariate shift: the same input gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.support.errors import DdilError
from ddil_eval.report import figures, paper_figures, tables
from ddil_eval.report.drift_panels import filled_panels
from ddil_eval.report.records import read_records
from tests.eval.report.pages import drift_of_groups, everything
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
            f"{path.parent.name}/{path.name}": path.read_bytes()
            for path in paper_figures.draw_all(tables.groups(records), tables.build(records), out)
        }
        for out in (tmp_path / "a", tmp_path / "b")
    )
    assert first == second and {name.partition("/")[2] for name in first} == {
        f"{name}{suffix}" for name in paper_figures.DRAWN for suffix in (".pdf", ".png")
    }
    assert len([name for name in first if name.endswith("drift.png")]) == 2  # of a student, and of groups of students
    assert all(content.startswith(b"%PDF" if name.endswith(".pdf") else b"\x89PNG") for name, content in first.items())


def test_groups_of_students_have_a_curve_each() -> None:
    """In falling time, whatever the order of the records; a value over all transitions is no point."""
    ratio, own = filled_panels(drift_of_groups(["PD", "DDIL"])[::-1])
    assert (ratio.panel.title, own.panel.title) == ("Covariate-shift ratio", "Disagreement on own states")
    assert ratio.times == ("999", "749.5", "500", "250") and ratio.panel.level == 1
    found = {curve.label: (curve.look, [(k, round(e.value, 9)) for k, e in points]) for curve, points in ratio.curves}
    assert found == {
        "DDIL": ("mixed", [(k, 1.2) for k in range(4)]),
        "PD": ("student", [(k, 1.1) for k in range(4)]),
    }
    assert [curve.metric for curve, _ in own.curves] == ["disagreement_student"] * 2


def test_no_two_curves_of_a_panel_look_alike() -> None:
    panels = filled_panels(drift_of_groups([f"group {k}" for k in range(7)]))
    assert [len(panel.curves) for panel in panels] == [5, 2, 5, 2]
    for panel in panels:
        looks = [curve.look for curve, _ in panel.curves]
        assert len(set(looks)) == len(looks)


def test_times_that_are_near_are_told_apart() -> None:
    (panel, _) = filled_panels(drift_of_groups(["PD", "DDIL"], [0.50001, 0.50002, 0.25]))
    assert panel.times == ("0.50002", "0.50001", "0.25")


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    """Matplotlib reads dollars as mathematics, and fails at those that are none."""
    name = r"$\frac{1}{2$"
    records = [system("teacher", 32), system(name, 4), *drift_of_groups(["PD", name])]
    files = paper_figures.draw_all(tables.groups(records), tables.build(records), tmp_path)
    assert [path.name for path in files] == ["systems.pdf", "systems.png", "drift.pdf", "drift.png"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        DdilError, match=r"^No record of a covariate-shift analysis can be drawn in .+a\.png: run `ddil eval"
    ):
        figures.shift_curves([system("PD", 4)], tmp_path / "a.png")
