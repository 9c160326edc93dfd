"""A tiny study end to end, with real workers; units go on where they stopped; equal teacher evaluations."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result

from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.models.model import Model, load_model
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.protocol import validate
from ddil_eval.study import study as study_module
from ddil_eval.study import unit as units_module
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.matrix import Unit, units_of
from ddil_eval.study.records import read_unit, record_path
from ddil_eval.study.study import run_study, too_few_seeds
from ddil_eval.study.unit import run_unit

METHOD = {
    "method": "pd",
    "reflection": {"mode": "none"},
    "student": {"width": 8, "depth": 1, "updates": 4},
    "stages": [{"steps": 4, "updates": 6}, {"steps": 2, "updates": 6}],
    "keep_stages": True,
    "batch_size": 4,
    "pool": 16,
    "save_every": 2,
    "warmup": 2,
}
PHASES = [{"until": 1, "aggregated": 0.5, "p_teacher": 0}]
STUDY: dict[str, Any] = {
    "teacher": "gaussians",
    "data": "gaussians",
    "methods": {"PD": METHOD},
    "sources": {"data": None, "student": {"capacity": 256, "phases": PHASES}},
    "seeds": 2,
    "measure": {"kinds": ["points"], "count": 64, "teacher_steps": 8},
}


def units_with(**changes: Any) -> list[Unit]:
    return units_of(validate(StudyConfig, STUDY | changes, "the study"))


def test_a_study_runs_and_names_what_fails(tmp_path: Path, cli: Callable[..., Result]) -> None:
    protocol, out = tmp_path / "study.yaml", tmp_path / "out"
    protocol.write_text(yaml.safe_dump(STUDY | {"factors": {"pool": [16, "all"]}}))
    planned = cli("study", protocol, "--out", out, "--dry-run")
    assert planned.exit_code == 0 and "8 units: 2 conditions x 2 sources and shares x 2 seeds" in planned.stdout
    assert "PD, pool 16, data: 112 teacher evaluations a seed" in planned.stdout and not out.exists()

    result = cli("study", protocol, "--out", out, "--jobs", 2)
    assert result.exit_code == 1
    assert "error: 4 units failed, first PD, pool all, " in result.stderr
    assert "'gaussians' does not say how many it has" in result.stderr and "tries them again" in result.stderr
    found = {unit: read_unit(out, unit) for unit in units_with(factors={"pool": [16]})}
    assert None not in found.values()
    assert "4 of 8 units are done" in (out / "study" / "README.md").read_text()
    runs = [sorted(path.name for path in (out / "runs" / unit.name).iterdir()) for unit in found]
    assert runs == [["log.jsonl", "run.yaml"]] * 4  # all else is deleted
    shared = [len(list((out / "shared").glob(f"{part}-*.safetensors"))) for part in ("data", "fit")]
    assert shared == [1, 2]  # the fit depends on the seed

    ends = {
        (unit.cell.source, unit.seed): record.students[2]["end_distance"] for unit, record in found.items() if record
    }
    expected = np.mean([np.log(ends["student", seed] / ends["data", seed]) for seed in (0, 1)])
    rows = list(csv.DictReader((out / "study" / "effects.csv").read_text().splitlines()))
    (row,) = (row for row in rows if (row["steps"], row["measure"]) == ("2", "end_distance"))
    assert float(row["change"]) == pytest.approx(np.expm1(expected), rel=1e-9)

    protocol.write_text(yaml.safe_dump(STUDY | {"factors": {"pool": [16]}}))
    before = {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    again = cli("study", protocol, "--out", out)
    assert again.exit_code == 0 and "4 of them are done" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()} == before


def test_a_stopped_unit_goes_on_at_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = units_with()[1]
    updates: list[int] = []
    update = ProgressiveStage.update

    def stopping(stage: ProgressiveStage, step: int) -> Any:
        updates.append(step)
        if len(updates) == 6:  # the last checkpoint of the first stage holds four updates
            raise KeyboardInterrupt
        return update(stage, step)

    monkeypatch.setattr(ProgressiveStage, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_unit(unit, tmp_path)
    updates.clear()
    with monkeypatch.context() as measuring, pytest.raises(KeyboardInterrupt):
        measuring.setattr(units_module, "measure_student", stopped)
        updates.extend([-1] * 10)
        run_unit(unit, tmp_path)
    assert updates[10:] == [4, 5, *range(6)]
    run_unit(unit, tmp_path)  # stopped while it was measured: nothing is trained again
    assert len(updates) == 10 + 8
    whole = tmp_path / "whole"
    monkeypatch.setattr(ProgressiveStage, "update", update)
    run_unit(unit, whole)
    stopped_once, never = (read_unit(folder, unit) for folder in (tmp_path, whole))
    assert stopped_once and never and stopped_once.students == never.students
    assert list(never.students) == [4, 2] and {"end_distance", "energy_distance"} <= never.students[4].keys()
    run_unit(unit, whole)  # a finished unit is left alone
    record_path(whole, unit).write_text("{")
    with pytest.raises(DdilError, match="is damaged; delete it"):
        read_unit(whole, unit)


def test_a_study_does_not_replace_the_page_of_another(tmp_path: Path) -> None:
    config = validate(StudyConfig, STUDY, "the study")
    page = tmp_path / "study" / "README.md"
    page.parent.mkdir()
    page.write_text("# By guidance\n\n216 of 216 units are done\n")
    with pytest.raises(
        WrongCommand, match="holds the results of the study 'By guidance', which this one would replace"
    ):
        run_study(config, tmp_path, 1)
    assert page.read_text().startswith("# By guidance")


def test_records_of_another_teacher_or_damaged_ones_stop_a_study_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that was trained again has the same name. No unit is run."""
    config = validate(StudyConfig, STUDY, "the study")
    unit = units_of(config)[0]
    run_unit(unit, tmp_path)
    monkeypatch.setattr(study_module, "run_tasks", None)
    with (
        monkeypatch.context() as again,
        pytest.raises(DdilError, match="1 of 1 records are of other weights of the tea"),
    ):
        again.setattr(Model, "weights_sha256", lambda _: "0" * 64)
        run_study(config, tmp_path, 1)
    record_path(tmp_path, unit).write_text("{")
    with pytest.raises(DdilError, match="is damaged; delete it"):
        run_study(config, tmp_path, 1)


@pytest.mark.parametrize(("steps", "seeds", "needed"), [([4, 2], 7, 7), ([4, 2], 6, 7), ([2], 6, 6), ([2], 5, 6)])
def test_too_few_seeds_for_any_significant_test_are_said(steps: list[int], seeds: int, needed: int) -> None:
    """The smallest p-value of n seeds is 2^(1−n): 2 tests need 7 seeds for 2 · 2^(1−n) < 0.05, and one test needs 6."""
    stages = [{"steps": number, "updates": 1} for number in steps]
    content = STUDY | {"methods": {"PD": METHOD | {"stages": stages}}, "seeds": seeds}
    config = validate(StudyConfig, content, "the study")
    reason = too_few_seeds(config, units_of(config))
    if seeds >= needed:
        assert reason is None
    else:
        smallest = len(steps) * 2.0 ** (1 - seeds)
        assert smallest >= 0.05
        assert reason == (
            f"none of the {len(steps)} tests can be significant with {seeds} seeds, since their smallest corrected p-value "
            f"is {smallest:.2g}; take at least {needed} seeds, or fewer tests"
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"factors": {"ddil.uses": [1, 2]}}, "the factor key 'ddil.uses' is set by seeds, sources and methods"),
        ({"factors": {"pool": [16, 16]}}, "a value of the factor 'pool' stands twice"),
        ({"measure": {"kinds": ["points", "drift"]}}, "the kinds 'points' and 'drift' measure the same"),
        ({"measure": {"kinds": ["images"], "metrics": ["fda"]}}, "there is no metric 'fda'"),
        (
            {"measure": {"kinds": ["drift"], "tested": ["energy_distance"]}},
            "'energy_distance' in 'tested' is not measured",
        ),
    ],
)
def test_a_study_that_cannot_be_analysed_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WrongCommand, match=re.escape(sentence)):
        units_with(**changes)


def test_near_values_have_units_of_their_own() -> None:
    names = [unit.name for unit in units_with(factors={"learning_rate": [1e-3, 1.0000001e-3]})]
    assert len(set(names)) == len(names) == 8 and any("0.0010000001" in name for name in names)


def test_a_message_names_the_cell() -> None:
    sentences = [unit.cell.sentence() for unit in units_with(shares=(0.5,), seeds=2)[:2]]
    assert sentences == [
        "the condition 'PD' with the source 'data'",
        "the condition 'PD' with the source 'student' and the share 0.5",
    ]


def stopped(_: object) -> dict[str, float]:
    raise KeyboardInterrupt


def test_with_equal_evaluations_states_that_serve_twice_give_more_updates() -> None:
    twice = STUDY["sources"]["student"] | {"uses": 2}
    data, student = units_with(budget="teacher_evaluations", sources={"data": None, "student": twice})[:2]
    model = load_model("gaussians")
    (plain, budget), (scaled, spent) = data.within_budget(model), student.within_budget(model)
    assert budget == 4 * (4 + 2 * 6 + 2 * 6)  # the fit, then two steps of each state
    assert spent is not None and 0.8 * budget <= spent <= budget
    assert [stage["updates"] for stage in plain.model_dump()["stages"]] == [6, 6]
    assert all(stage["updates"] > 6 for stage in scaled.model_dump()["stages"])
    assert student.key != data.key


@pytest.mark.weights
def test_any_teacher_is_measured_by_its_drift(tmp_path: Path) -> None:
    """The shipped teacher as its own student of 4 steps."""
    method = {"method": "pd", "stages": [{"steps": 4, "updates": 1}], "batch_size": 2, "pool": 8}
    measure = {"kinds": ["drift", "images"], "count": 8, "teacher_steps": 8, "metrics": ["drawn_right"]}
    unit = units_with(teacher="shapes", data="shapes", methods={"PD": method}, measure=measure)[0]
    run_unit(unit, tmp_path)
    record = read_unit(tmp_path, unit)
    assert record is not None
    found = record.students[4]
    assert set(found) == {
        "end_distance", "shift_ratio", "disagreement_data", "disagreement_teacher", "disagreement_student", "drawn_right",
    }  # fmt: skip
    assert found["shift_ratio"] == pytest.approx(found["disagreement_student"] / found["disagreement_data"])
    assert 0 < found["end_distance"] < 2 and 0 <= found["drawn_right"] <= 1
