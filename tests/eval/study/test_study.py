"""A tiny study end to end, with real workers; units go on where they stopped; equal teacher evaluations."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result

from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.models.model import load_model
from ddil_core.support.errors import DdilError
from ddil_core.support.protocol import validate
from ddil_eval.study import unit as units_module
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.matrix import Unit, units_of
from ddil_eval.study.records import read_unit, record_path
from ddil_eval.study.unit import run_unit


def content(teacher: Path) -> dict[str, Any]:
    stages = [{"steps": 4, "updates": 6}, {"steps": 2, "updates": 6}]
    method = {"method": "pd", "stages": stages, "batch_size": 4, "pool": 16, "save_every": 2, "warmup": 2}
    phases = [{"until": 1, "aggregated": 0.5, "p_teacher": 0}]
    return {
        "teacher": str(teacher),
        "methods": {"PD": method},
        "sources": {"data": None, "student": {"capacity": 256, "phases": phases}},
        "seeds": 2,
        "measure": {"count": 8, "teacher_steps": 8},
    }


@pytest.fixture
def units(teacher: Path) -> list[Unit]:
    return units_of(validate(StudyConfig, content(teacher), "the study"))


def test_a_study_runs_and_names_what_fails(teacher: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    protocol, out = tmp_path / "study.yaml", tmp_path / "out"
    protocol.write_text(yaml.safe_dump(content(teacher) | {"factors": {"pool": [16, "all"]}}))
    planned = cli("study", protocol, "--out", out, "--dry-run")
    assert planned.exit_code == 0 and "8 units: 2 conditions x 2 sources and shares x 2 seeds" in planned.stdout
    assert "PD, pool 16, data: 192 teacher evaluations a seed" in planned.stdout and not out.exists()

    result = cli("study", protocol, "--out", out, "--jobs", 2)
    assert result.exit_code == 1
    assert "error: 4 units failed, first PD, pool all, " in result.stderr
    assert "'shapes' does not say how many it has" in result.stderr and "tries them again" in result.stderr
    config = validate(StudyConfig, content(teacher) | {"factors": {"pool": [16]}}, "the study")
    found = {unit: read_unit(out, unit) for unit in units_of(config)}
    assert None not in found.values()
    assert "4 of 8 units are done" in (out / "study" / "README.md").read_text()
    runs = [sorted(path.name for path in (out / "runs" / unit.name).iterdir()) for unit in found]
    assert runs == [["log.jsonl", "run.yaml"]] * 4  # all else is deleted
    assert len(list((out / "shared").glob("data-*.safetensors"))) == 1

    ends = {
        (unit.cell.source, unit.seed): record.students[2]["end_distance"] for unit, record in found.items() if record
    }
    expected = np.mean([np.log(ends["student", seed] / ends["data", seed]) for seed in (0, 1)])
    rows = list(csv.DictReader((out / "study" / "effects.csv").read_text().splitlines()))
    (row,) = (row for row in rows if (row["steps"], row["measure"]) == ("2", "end_distance"))
    assert float(row["change"]) == pytest.approx(np.expm1(expected), rel=1e-9)

    protocol.write_text(yaml.safe_dump(content(teacher) | {"factors": {"pool": [16]}}))
    before = {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    again = cli("study", protocol, "--out", out)
    assert again.exit_code == 0 and "4 of them are done" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()} == before


def test_a_stopped_unit_goes_on_at_its_checkpoint(
    units: list[Unit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[int] = []
    update = ProgressiveStage.update

    def stopping(stage: ProgressiveStage, step: int) -> Any:
        updates.append(step)
        if len(updates) == 6:  # the last checkpoint of the first stage holds four updates
            raise KeyboardInterrupt
        return update(stage, step)

    monkeypatch.setattr(ProgressiveStage, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_unit(units[1], tmp_path)
    updates.clear()
    with monkeypatch.context() as measuring, pytest.raises(KeyboardInterrupt):
        measuring.setattr(units_module, "measure_student", stopped)
        updates.extend([-1] * 10)
        run_unit(units[1], tmp_path)
    assert updates[10:] == [4, 5, *range(6)]
    run_unit(units[1], tmp_path)  # stopped while it was measured: nothing is trained again
    assert len(updates) == 10 + 8
    whole = tmp_path / "whole"
    monkeypatch.setattr(ProgressiveStage, "update", update)
    run_unit(units[1], whole)
    stopped_once, never = (read_unit(folder, units[1]) for folder in (tmp_path, whole))
    assert stopped_once and never and stopped_once.students == never.students
    run_unit(units[1], whole)  # a finished unit is left alone
    record_path(whole, units[1]).write_text("{")
    with pytest.raises(DdilError, match="is damaged; delete it"):
        read_unit(whole, units[1])


def stopped(_: object) -> dict[str, float]:
    raise KeyboardInterrupt


def test_with_equal_evaluations_states_that_serve_twice_give_more_updates(teacher: Path) -> None:
    told = content(teacher) | {"budget": "teacher_evaluations"}
    told["sources"]["student"] |= {"uses": 2}
    data, student = units_of(validate(StudyConfig, told, "the study"))[:2]
    model = load_model(str(teacher))
    (plain, budget), (scaled, spent) = data.within_budget(model), student.within_budget(model)
    assert budget == 2 * 4 * (6 * 2 + 6)  # two steps of each state; the first teacher is guided
    assert spent is not None and 0.8 * budget <= spent <= budget
    assert [stage["updates"] for stage in plain.model_dump()["stages"]] == [6, 6]
    assert all(stage["updates"] > 6 for stage in scaled.model_dump()["stages"])
    assert json.dumps(student.study) == json.dumps(data.study) and student.key != data.key
