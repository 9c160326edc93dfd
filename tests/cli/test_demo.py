"""``ddil demo``: its protocol is valid, and does what the demonstration promises."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.support import resources
from ddil_core.support.protocol import read_yaml, validate
from ddil_core.support.resources import protocols
from ddil_eval.cli.demo import NOTICE, _measured, _share_encoded_data, _with_students
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig
from ddil_eval.experiments.systems import SystemsConfig
from ddil_eval.report import records as store
from tests.records import p_teacher, system

STUDENTS = {"PD": Path("out/pd"), "DDIL": Path("out/ddil")}


@pytest.fixture
def content() -> dict[str, Any]:
    return read_yaml(protocols() / "shapes" / "demo.yaml")


def test_the_protocol_is_valid_and_keeps_the_promise(content: dict[str, Any]) -> None:
    assert set(content) == {"distill", "covariate_shift", "systems"}
    distill = validate(ProgressiveConfig, content["distill"], "demo.yaml")
    assert distill.stages[-1].steps == 4 and distill.ddil is not None
    analysis = validate(CovariateShiftConfig, content["covariate_shift"], "demo.yaml")
    assert analysis.num_prompts is not None and analysis.num_prompts >= 256
    systems = validate(SystemsConfig, content["systems"], "demo.yaml")
    assert systems.num_prompts >= 256
    assert {(s.model, s.steps) for s in systems.systems} == {
        ("shapes", 16), ("shapes", 4), ("PD", 4), ("DDIL", 4),
    }  # fmt: skip
    assert analysis.teacher_steps == systems.systems[0].steps


@pytest.mark.parametrize("name", ["pd", "covariate-shift"])
def test_the_other_protocols_are_valid(name: str) -> None:
    path = protocols() / "shapes" / f"{name}.yaml"
    model = ProgressiveConfig if name == "pd" else CovariateShiftConfig
    validated = validate(model, read_yaml(path), str(path))
    if isinstance(validated, CovariateShiftConfig):
        assert validated == CovariateShiftConfig()  # the file is the defaults, written out


def test_students_stand_in_for_their_names(content: dict[str, Any]) -> None:
    systems = _with_students(content["systems"], STUDENTS)
    assert [row["model"] for row in systems["systems"]] == ["shapes", "shapes", "out/pd", "out/ddil"]
    assert [row["name"] for row in systems["systems"]] == [row["name"] for row in content["systems"]["systems"]]
    assert systems["differences"] == content["systems"]["differences"]
    assert content["systems"]["systems"][2]["model"] == "PD"  # what was read is left as it is


def test_it_counts_what_an_earlier_demo_measured(tmp_path: Path) -> None:
    assert _measured(tmp_path / "nothing", "systems") == 0
    for record in (system("PD", 4), system("DDIL", 4), p_teacher(0.8)):
        store.save_record(record, tmp_path)
    assert (_measured(tmp_path, "systems"), _measured(tmp_path, "covariate-shift")) == (2, 1)


def test_the_second_student_takes_the_data_that_the_first_one_encoded(tmp_path: Path) -> None:
    first, second = tmp_path / "pd", tmp_path / "ddil"
    assert not _share_encoded_data(first, second)  # nothing is encoded yet, and nothing is made
    assert not second.exists()
    encoded = first / "checkpoints" / "data.safetensors"
    encoded.parent.mkdir(parents=True)
    encoded.write_bytes(b"encoded")
    assert _share_encoded_data(first, first)
    assert _share_encoded_data(first, second)
    names = sorted(path.name for path in (second / "checkpoints").iterdir())
    assert names == ["data.safetensors", "data.safetensors.sha256"]
    assert (second / "checkpoints" / "data.safetensors").read_bytes() == b"encoded"
    encoded.write_bytes(b"other")
    assert _share_encoded_data(first, second)
    assert (second / "checkpoints" / "data.safetensors").read_bytes() == b"encoded"  # a run keeps what it trains on


def test_it_says_that_it_is_a_demonstration() -> None:
    assert "demonstration" in NOTICE and "its numbers say nothing about the methods" in NOTICE


@pytest.mark.weights
@pytest.mark.slow
def test_a_small_demo_runs_from_end_to_end_and_is_not_made_again(
    cli: Callable[..., Result], content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped teacher with few updates, prompts and metrics: only the protocol differs from the demo's own."""
    shrink(content)
    folder = tmp_path / "protocols"
    shutil.copytree(protocols(), folder)
    (folder / "shapes" / "demo.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(resources, "protocols", lambda: folder)
    out = tmp_path / "out"
    for _ in range(2):
        result = cli("demo", "--out", out, "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        made = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
        for name in ("pd/student/model_index.json", "ddil/student/model_index.json"):
            assert (out / name).is_file()
        (figures,) = (out / "covariate-shift").glob("ddil-*")
        assert {path.name for path in figures.glob("*.png")} == {"figure2.png", "shift-curves.png"}
        assert f"Figure 2 is {figures / 'figure2.png'}" in result.stderr
        assert {"systems", "differences", "pure", "table2", "table3", "table4"} <= {
            path.stem for path in (out / "report").rglob("*.csv")
        }
        assert result.stderr.count("This is a demonstration") == 2
        encoded = [(out / student / "checkpoints" / "data.safetensors").read_bytes() for student in ("pd", "ddil")]
        assert encoded[0] == encoded[1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == made
    assert sum(record.kind != "pair" for record in store.read_records(out)) == 5 + 12


def shrink(content: dict[str, Any]) -> None:
    content["distill"] |= {"stages": [{"steps": 4, "updates": 2}], "batch_size": 8, "pool": 16}
    content["distill"]["ddil"] |= {"collect_every": 2, "capacity": 64}
    small = {"num_prompts": 4, "reference_images": 8, "metrics": ["drawn_right"], "batch_size": 8}
    content["systems"] |= small
    content["covariate_shift"] |= small | {"teacher_steps": 8, "figure_prompts": 1}
    content["systems"]["systems"][0]["steps"] = 8
