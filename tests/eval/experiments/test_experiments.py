"""The table of experiments, and the functions with plain arguments that run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import read_yaml, validate
from ddil_core.support.resources import protocols
from ddil_eval.experiments import covariate_shift as analysis
from ddil_eval.experiments import rollout_tree
from ddil_eval.experiments.api import compare, covariate_shift, score
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig
from ddil_eval.experiments.experiments import EXPERIMENTS, find_experiment
from ddil_eval.experiments.systems import SystemsConfig
from ddil_eval.report.records import Record, read_records
from tests.counted import Counted
from tests.records import system


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


# The table


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_a_shipped_protocol_is_of_its_experiment(name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert experiment.name == name and experiment.config.model_fields["experiment"].default == name
    if experiment.protocol is None:
        return
    content = read_yaml(protocols() / experiment.protocol)
    assert find_experiment(content["experiment"]) is experiment
    config = validate(experiment.config, content, experiment.protocol)
    assert "shapes" in experiment.models(config)


@pytest.mark.parametrize("name", ["coco", "compare", "systems"])
def test_former_names_of_the_comparison_are_read(name: str) -> None:
    assert find_experiment(name) is EXPERIMENTS["systems"]
    content = {"experiment": name, "systems": [{"name": "a", "model": "shapes"}]}
    assert validate(SystemsConfig, content, "x.yaml").experiment == "systems"


def test_an_experiment_that_is_no_name_is_refused() -> None:
    with pytest.raises(WrongCommand, match=r"^the experiment '\[1\]' is not a name; it may be one of systems, "):
        find_experiment([1])


def test_records_of_a_former_name_are_the_same_measurement(tmp_path: Path) -> None:
    record = system("a", 4)
    former = json.loads(record.model_dump_json()) | {"experiment": "compare"}
    assert record.experiment == "systems"
    assert Record.model_validate(former) == record
    assert Record.model_validate(former).identity() == record.identity()


def test_identities_of_the_shipped_records_did_not_change(root: Path) -> None:
    """A record's file name ends in the start of its identity. Those in `old` are from before fields were added."""
    shipped, old = read_records_of(root / "results" / "shapes"), read_records_of(Path(__file__).parent / "old")
    assert len(shipped) > 70 and len(old) == 9
    assert [name for name, record in (shipped | old).items() if record.identity()[:12] not in name] == []


def read_records_of(folder: Path) -> dict[str, Record]:
    """Return the records of a folder by the names of their files."""
    files = [path for path in folder.rglob("*.json") if path.parent.name == "records"]
    contents = {path.stem: json.loads(path.read_text()) for path in files}
    return {
        name: Record.model_validate({key: value for key, value in content.items() if key != "content_sha256"})
        for name, content in contents.items()
    }


# Plain arguments


def test_compare_takes_models_and_goes_on(student: Path, teacher: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"num_prompts": 4, "steps": 2, "metrics": ["brightness"], "out": tmp_path}
    records = compare([str(teacher), str(student)], "shapes", **given)
    assert [record.kind for record in records] == ["system", "system", "difference"]
    assert {record.cell.get("steps") for record in records} == {2, None}
    again = compare(
        [str(teacher), str(student)], config=SystemsConfig.model_validate({**COMPARISON, "seed": 0}), **given
    )
    assert [record.numbers() for record in again] == [record.numbers() for record in records]
    assert len(read_records(tmp_path)) == 3


COMPARISON: dict[str, Any] = {"systems": [{"name": "another", "model": "nowhere"}], "num_prompts": 9}


def test_covariate_shift_takes_two_models_and_draws_its_figure_with_them(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Counted(of=rollout_tree.load_model)
    monkeypatch.setattr(rollout_tree, "load_model", loaded)
    config = CovariateShiftConfig(reference_images=8, figure_prompts=1)
    given: dict[str, Any] = {"num_prompts": 4, "teacher_steps": 4, "p_teacher": [0.5], "switch": [500]}
    given |= {"out": tmp_path, "config": config, "metrics": ["brightness"]}
    records = covariate_shift(str(teacher), str(student), **given, seed=3)
    assert [record.kind for record in records] == [
        *("pure", "pure", "p_teacher", "teacher_then_student", "student_then_teacher")
    ]
    assert loaded.chunks == 2 and len(list(tmp_path.glob("covariate-shift/*/figure2.png"))) == 1
    assert {record.seeds[0] for record in records} == {3}
    protocol = records[0].protocol
    assert (protocol["teacher"], protocol["student"]) == (str(teacher), str(student))
    kept = {path: path.read_bytes() for path in tmp_path.glob("covariate-shift/*/*.*")}
    covariate_shift(str(teacher), str(student), **given, seed=4)
    assert {path: path.read_bytes() for path in kept} == kept  # other settings replace nothing
    assert len(list(tmp_path.glob("covariate-shift/*/figure2.png"))) == 2


def test_the_models_are_no_part_of_the_protocols_hash(student: Path, teacher: Path) -> None:
    """Records name the models and the hashes of their weights, and old records' protocols held no models."""
    small = {"num_prompts": 4, "reference_images": 8, "metrics": ("brightness",), "teacher_steps": 4}
    config = CovariateShiftConfig.model_validate(small | {"teacher": str(teacher), "student": str(student)})
    plan = analysis.plan_covariate_shift(config)
    written = {key: value for key, value in plan.protocol.items() if key != "sampling"} | {"recipe": "shapes"}
    assert validate(CovariateShiftConfig, written, "x.yaml").student == str(student)
    unhashed = {"teacher", "student", "sampling", "drift", "dtype", "tf32", "compile", "height", "width"}
    assert analysis.hashed(plan.protocol, analysis.NOT_HASHED).keys() == plan.protocol.keys() - unhashed


def test_score_takes_folders(student: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"metrics": ["brightness"]}
    (drawn,) = compare([str(student)], num_prompts=4, out=tmp_path / "drawn", save_images=True, **given)
    (folder,) = (tmp_path / "drawn" / "images").iterdir()
    (record,) = score([folder], "shapes", out=tmp_path / "scored", num_reference_images=8, **given)
    assert record.metrics["brightness"].estimate == drawn.metrics["brightness"].estimate
    assert (record.experiment, record.protocol["experiment"]) == ("systems", "score")


def test_a_wrong_argument_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WrongCommand, match=r"^the call has a value that does not fit at 'num_prompts'"):
        compare(["shapes"], num_prompts=1, out=tmp_path)
    with pytest.raises(WrongCommand, match="need models"):
        compare(config=SystemsConfig.model_validate(COMPARISON), steps=2, out=tmp_path)
    with pytest.raises(WrongCommand, match="lacks the key 'systems'"):
        compare(out=tmp_path)
