"""Distillation of the exact teacher: a new network is fitted, every stage leaves a student, and each method runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_core.data.gaussians import GaussiansData
from ddil_core.distillation.distill import distill
from ddil_core.distillation.run_folder import read_run
from ddil_core.models.model import load_model
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.protocol import read_yaml

ROOT = Path(__file__).parents[3]
TINY: dict[str, Any] = {"pool": 256, "batch_size": 16, "student": {"width": 16, "depth": 2, "updates": 4}}


def protocol(shipped: str, **changes: Any) -> dict[str, Any]:
    """The shipped protocol of a method with a small student and few updates."""
    ddil = {"capacity": 4096, "collect_every": 4, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]}
    return read_yaml(ROOT / "protocols" / "gaussians" / f"{shipped}.yaml") | TINY | {"ddil": ddil} | changes


PD = protocol("pd", stages=[{"steps": 4, "updates": 3}, {"steps": 2, "updates": 3}])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gaussians") / "pd"
    distill("gaussians", "gaussians", PD, out, device="cpu")
    return out


def test_every_stage_leaves_its_student(run: Path) -> None:
    students = {steps: load_model(str(run / "stages" / f"{steps}-steps"), "cpu") for steps in (4, 2)}
    assert {steps: student.sampling.steps for steps, student in students.items()} == {4: 4, 2: 2}
    last, student = students[2].denoiser.net.state_dict(), load_model(str(run), "cpu").denoiser.net.state_dict()
    assert all(torch.equal(last[name], student[name]) for name in student)
    first = students[4].denoiser.net.state_dict()
    assert not all(torch.equal(first[name], student[name]) for name in student)
    assert students[4].weights_sha256() != students[2].weights_sha256()


def test_a_run_of_one_seed_is_repeated_bit_for_bit_and_keeps_no_stage_unasked(run: Path, tmp_path: Path) -> None:
    distill("gaussians", "gaussians", PD | {"keep_stages": False}, tmp_path / "again", device="cpu")
    assert not (tmp_path / "again" / "stages").exists()
    assert load_model(str(tmp_path / "again"), "cpu").weights_sha256() == load_model(str(run), "cpu").weights_sha256()
    assert read_run(run / "run.yaml")["config"]["student"]["width"] == 16


@pytest.mark.parametrize(("method", "changes"), [("lcm", {"updates": 3}), ("dmd2", {"updates": 2})])
def test_the_other_methods(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    distill("gaussians", "gaussians", protocol(method, **changes), tmp_path / "run", device="cpu")
    student = load_model(str(tmp_path / "run"), "cpu")
    assert student.sampling.solver == "lcm"
    assert (student.denoiser.guidance_width is not None) == (method == "lcm")


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ("shapes", {"data": "shapes"}, "the student of 'shapes' starts from its teacher's network"),
        (
            "gaussians",
            {"student": None},
            "is a formula without weights, so that its student needs a network of its own",
        ),
        ("gaussians", {"student": {"width": 6}}, "student.width"),
        ("gaussians", {"updates": 2, "lora": {}, "w_embedding": None}, "a LoRA adapts the layers of a U-Net"),
        ("gaussians", {"data": "shapes"}, "the teacher 'gaussians' draws 1 x 1"),
    ],
)
def test_what_does_not_fit_is_refused(teacher: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = changes.pop("data", "gaussians")
    content = protocol("lcm", **changes) if "lora" in changes else PD | changes
    with pytest.raises((WrongCommand, DdilError), match=message):
        distill(teacher, data, content, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_batches_of_points_depend_on_their_index_alone() -> None:
    data = GaussiansData()
    batches = list(data.training(150, batch_size=64))
    later = list(data.training(150, batch_size=64, first=2))
    assert [len(points) for points, _ in batches] == [64, 64, 22]
    assert (later[0][0] == batches[2][0]).all() and later[0][1] == batches[2][1]
    assert [prompt.text for prompt in data.prompts(5)] == [prompt.text for prompt in data.prompts(50)][:5]
