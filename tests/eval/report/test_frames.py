"""``load_records``: records as a pandas DataFrame, one row for each cell."""

from __future__ import annotations

import doctest
import math
from pathlib import Path

import pytest

from ddil_core.support.errors import DdilError
from ddil_eval.report import frames
from ddil_eval.report.frames import load_records
from ddil_eval.report.records import RecordedEstimate, save_record
from tests.records import measured, p_teacher, record, system


def test_a_row_holds_the_cell_the_setting_and_the_metrics(tmp_path: Path) -> None:
    saved = p_teacher(0.8)
    save_record(saved, tmp_path)
    (row,) = load_records(tmp_path).to_dict("records")
    assert row == {
        "experiment": "covariate-shift", "kind": "p_teacher", "p_teacher": 0.8,
        "models": ("shapes", "runs/pd_4"), "data": "shapes", "split": "val", "recipe": "shapes-64", "solver": "ddim",
        "guidance_scale": 3.0, "dtype": "fp32", "tf32": False, "compile": False, "size": None, "seed": 0,
        "n_asked": 256, "n_done": 256, "nfe": 40.8,
        "fd_efflite0": 12.5, "fd_efflite0_low": 12.0, "fd_efflite0_high": 13.0,
        "drawn_right": 0.75, "drawn_right_low": 0.71875, "drawn_right_high": 0.78125,
        "identity": saved.identity(), "protocol_hash": "0" * 64, "wall_time_s": 12.0, "device": "cpu", "commit": None,
        "created": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip


def test_records_of_several_experiments_share_one_frame(tmp_path: Path) -> None:
    for saved in (p_teacher(0.8), system("PD", 4), record({"kind": "effect", "transitions": [0, 2]}, right=None)):
        save_record(saved, tmp_path / saved.experiment)
    frame = load_records(tmp_path).set_index("kind")
    assert frame.loc["system", ["name", "steps"]].tolist() == ["PD", 4]
    assert math.isnan(frame.loc["system", "p_teacher"])
    assert frame.loc["effect", "transitions"] == (0, 2) and math.isnan(frame.loc["effect", "drawn_right"])
    assert list(frame.columns)[-1] == "created"  # metrics stand together, before the origin


def test_p_values_and_notes_have_columns_where_a_record_has_them(tmp_path: Path) -> None:
    estimate = RecordedEstimate(value=-1, low=-2, high=0, n=256, p_value=0.01, note="too few images")
    metric = measured(0, 1).model_copy(update={"estimate": estimate})
    save_record(record({"kind": "effect", "transitions": [0]}, metrics={"fid": metric}), tmp_path)
    (row,) = load_records(tmp_path).to_dict("records")
    assert (row["fid"], row["fid_p"], row["fid_note"]) == (-1, 0.01, "too few images")


def test_older_records_of_a_measurement_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    save_record(p_teacher(0.8, fd=10.0), tmp_path)
    save_record(p_teacher(0.8, fd=11.0, created="2026-02-02T03:04:05+00:00"), tmp_path)
    assert load_records(tmp_path)["fd_efflite0"].tolist() == [11.0]
    assert sorted(load_records(tmp_path, replaced=True)["fd_efflite0"]) == [10.0, 11.0]


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DdilError, match="There are no records in .*nowhere: name a results folder"):
        load_records(tmp_path / "nowhere")


def test_the_example_is_true(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert doctest.testmod(frames).failed == 0
