"""Systems side by side: each as it samples by itself, their differences paired by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddil_core.data import open_data
from ddil_core.errors import WrongCommand
from ddil_core.models import load_model
from ddil_core.noise import Sample, initial_noise
from ddil_core.protocol import validate
from ddil_core.schedule import grid
from ddil_eval.experiments import systems
from ddil_eval.experiments.systems import SystemsConfig, compare
from ddil_eval.store import Record, load
from ddil_eval.tables import build
from tests.counted import Counted
from tests.pipelines import plain_picture, plain_step
from tests.pixels import NAMES

PROMPTS = 7


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


@pytest.fixture(scope="module")
def config(teacher: Path, student: Path) -> SystemsConfig:
    return SystemsConfig.model_validate(
        {
            "systems": [
                {"name": "teacher, 6 steps", "model": str(teacher), "steps": 6},
                {"name": "teacher, 4 steps", "model": str(teacher), "steps": 4, "guidance_scale": 1.0},
                {"name": "student", "model": str(student), "steps": 4},
            ],
            "differences": [["student", "teacher, 6 steps"]],
            "num_prompts": PROMPTS,
            "reference_pictures": 60,
            "metrics": NAMES,
            "batch_size": 4,
        }
    )


@pytest.fixture(scope="module")
def out(config: SystemsConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("systems")
    compare(config, folder)
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> dict[str, Record]:
    return {str(record.cell["name"]): record for record in load(out)}


def test_every_system_and_difference_has_its_record(records: dict[str, Record], config: SystemsConfig) -> None:
    assert {name: record.kind for name, record in records.items()} == {
        "teacher, 6 steps": "system",
        "teacher, 4 steps": "system",
        "student": "system",
        "student − teacher, 6 steps": "difference",
    }
    settings = {name: (r.nfe, r.guidance_scale, r.grid) for name, r in records.items() if r.kind == "system"}
    assert settings == {
        "teacher, 6 steps": (12, 3.0, grid(6)),
        "teacher, 4 steps": (4, 1.0, grid(4)),
        "student": (4, 1.0, grid(4)),
    }
    assert {name: list(record.systems) for name, record in records.items()} == {
        "teacher, 6 steps": ["teacher, 6 steps"],
        "teacher, 4 steps": ["teacher, 4 steps"],
        "student": ["student"],
        "student − teacher, 6 steps": ["student", "teacher, 6 steps"],
    }
    assert {(record.experiment, record.n_done) for record in records.values()} == {("compare", PROMPTS)}


@pytest.mark.parametrize(("name", "steps", "scale"), [("teacher, 6 steps", 6, 3.0), ("student", 4, 1.0)])
def test_a_system_is_that_model_by_itself(
    name: str, steps: int, scale: float, records: dict[str, Record], teacher: Path, student: Path
) -> None:
    pipeline: Any = load_model(str(student if name == "student" else teacher)).pipeline
    found = []
    for prompt in open_data("shapes").prompts(PROMPTS):
        z = initial_noise([Sample(prompt.id)], (8, 8, 8), 0)
        for t, s in zip(grid(steps), [*grid(steps)[1:], None], strict=True):
            z = plain_step(pipeline, z, prompt.text, t, s, scale)
        found.append(plain_picture(pipeline, z).mean().item())
    assert records[name].metrics["brightness"].estimate.value == pytest.approx(np.mean(found), abs=2e-5)


def test_a_difference_is_the_first_less_the_second(records: dict[str, Record]) -> None:
    difference = records["student − teacher, 6 steps"]
    for name in NAMES:
        a, b = (records[system].metrics[name].estimate.value for system in ("student", "teacher, 6 steps"))
        estimate = difference.metrics[name].estimate
        assert estimate.value == pytest.approx(a - b, abs=1e-9)
        assert estimate.low <= estimate.value <= estimate.high
        assert difference.metrics[name].direction == records["student"].metrics[name].direction


def test_it_makes_a_table_of_systems_and_one_of_differences(records: dict[str, Record]) -> None:
    tables = {table.name: table for table in build(records.values())}
    assert {row[0] for row in tables["systems"].rows} == {"student", "teacher, 4 steps", "teacher, 6 steps"}
    assert [row[0] for row in tables["differences"].rows] == ["student − teacher, 6 steps"]


def test_made_again_it_adds_nothing(out: Path, config: SystemsConfig) -> None:
    before = sorted((out / "records").iterdir())
    compare(config, out)
    assert sorted((out / "records").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"differences": [["student", "nobody"]]},
            "x.yaml has a value that does not fit: the differences name 'nobody', which is none of the systems student",
        ),
        (
            {"systems": [{"name": "student", "model": "shapes", "steps": 4}] * 2},
            "x.yaml has a value that does not fit: two systems are named 'student'",
        ),
        (
            {"systems": [{"name": "student", "model": "shapes", "steps": 0}]},
            "x.yaml has a value that does not fit at 'systems.0.steps': "
            "Input should be greater than or equal to 1, not 0",
        ),
        ({"sytems": []}, "x.yaml has the unknown key 'sytems'; did you mean 'systems'?"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_refused(change: dict[str, Any], sentence: str) -> None:
    content: dict[str, Any] = {"systems": [{"name": "student", "model": "shapes", "steps": 4}]}
    with pytest.raises(WrongCommand) as error:
        validate(SystemsConfig, content | change, "x.yaml")
    assert str(error.value) == sentence


def test_an_interrupted_comparison_goes_on_at_the_next_batch(
    config: SystemsConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "rollout", Counted(allowed=3))
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path)
    assert load(tmp_path) == [] and len(list(tmp_path.rglob("*.npz"))) == 3
    rest = Counted()
    monkeypatch.setattr(systems, "rollout", rest)
    compare(config, tmp_path)
    assert rest.chunks == 3  # three systems of two batches each, of which three were done
    assert {r.identity(): r.numbers() for r in load(tmp_path)} == {r.identity(): r.numbers() for r in load(out)}
    assert list(tmp_path.rglob("*.npz")) == []
