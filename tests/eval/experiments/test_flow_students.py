"""Students of a flow transformer in the analyses: on the flow's own times, some of which are fractions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddil_core.data.datasets import open_data
from ddil_core.diffusion.noise import Sample
from ddil_core.distillation.distill import distill
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import load_model
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig, analyse_covariate_shift
from ddil_eval.experiments.drift import measure_drift
from ddil_eval.experiments.drift_config import DriftConfig
from ddil_eval.experiments.drift_states import KINDS, measure_states, pair_models
from ddil_eval.experiments.systems import SystemsConfig, compare_systems
from ddil_eval.report import tables
from ddil_eval.report.records import read_records
from tests.pipelines import save_pipeline
from tests.pixels import NAMES

SMALL = {"batch_size": 4, "pool": 8}
PD = SMALL | {"method": "pd", "stages": [{"steps": 4, "updates": 2}]}
DMD2 = SMALL | {"method": "dmd2", "updates": 1, "critic_updates": 1, "timesteps": [999, 599, 199]}
TIMES = [1000, 1000 * 1.8 / 2.2, 1000 * 0.6 / 1.4]  # of 0.6 and 0.2, shifted by 3
COUNT = 6
PROMPTS = open_data("shapes").prompts(COUNT)
IMAGES = np.concatenate(list(open_data("shapes").images(COUNT)))


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampling = {"solver": "flow_euler", "steps": None, "guidance_scale": 3.0}
    return save_pipeline(tmp_path_factory.mktemp("flow"), sampling, seed=1, layout="StableDiffusion3Pipeline")


@pytest.fixture(scope="module")
def students(flow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("students")
    return {
        config["method"]: distill(str(flow), "shapes", config, out / config["method"], device="cpu")
        for config in (PD, DMD2)
    }


def test_teacher_and_student_take_turns_and_drift_is_measured_on_the_way(
    flow: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    config = CovariateShiftConfig(
        teacher=str(flow), student=str(students["pd"]), teacher_steps=8, switch=(900, 750, 500), num_prompts=COUNT,
        reference_images=8, metrics=NAMES, batch_size=8, chunk=4, figure_prompts=0, drift=True,
    )  # fmt: skip
    records = analyse_covariate_shift(config, tmp_path)
    shift = [record for record in records if record.experiment != "drift"]
    assert len(shift) == 12 and all(record.grid == [1000, 900, 750, 500] for record in shift)
    drift = {record.cell["t"] for record in records if record.kind == "drift"}
    assert drift == {1000, 900, 750, 500, "all"}


def test_the_drift_of_a_stochastic_student_is_measured_at_its_own_times(
    flow: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    config = DriftConfig(
        teacher=str(flow), students=(str(students["dmd2"]),), teacher_steps=8, num_prompts=COUNT, batch_size=4
    )
    measure_drift(config, tmp_path)
    records = [record for record in read_records(tmp_path) if record.kind == "drift"]
    times = [record.cell["t"] for record in records if record.cell["t"] != "all"]
    assert sorted(times, key=float, reverse=True) == pytest.approx(TIMES)
    table = next(table for table in tables.build(records) if table.name == "drift")
    assert len(table.rows) == 4 and not table.missing


def test_the_consistency_target_lies_twenty_timesteps_back_before_the_shift(
    flow: Path, students: dict[str, Path]
) -> None:
    """‖x̂(z_t) − x̂(z_s)‖² over the guided teacher's Euler step, with networks called by hand."""
    pair = pair_models(load_model(str(flow)), load_model(str(students["dmd2"])), 8, None, 20)
    assert pair.grid == pytest.approx(TIMES)
    found = measure_states(pair, PROMPTS, IMAGES, 0)
    samples, texts = [Sample(prompt.id) for prompt in PROMPTS], [prompt.text for prompt in PROMPTS]
    drawn = sample_latents(pair.student, samples, texts, resolve_sampling(pair.student), 0)
    assert np.allclose(found["end student"], drawn, atol=1e-4)
    told = pair.teacher.encode(texts).tensors
    nothing = {name: row.expand(COUNT, *row.shape[1:]) for name, row in pair.teacher.nothing().tensors.items()}

    def velocity(model: Any, z: torch.Tensor, t: float, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.denoiser.net(hidden_states=z, timestep=torch.full((COUNT,), t), **inputs).sample

    t, s = TIMES[1], 1000 * 3 * 0.58 / (1 + 2 * 0.58)
    with torch.no_grad():
        for kind in KINDS:
            z = torch.from_numpy(found[f"states {kind}"][:, 1])
            without, with_prompt = velocity(pair.teacher, z, t, nothing), velocity(pair.teacher, z, t, told)
            z_s = z + (s - t) / 1000 * (without + 3 * (with_prompt - without))
            value = z - t / 1000 * velocity(pair.student, z, t, told)
            target = z_s - s / 1000 * velocity(pair.student, z_s, s, told)
            expected = (value - target).square().flatten(1).mean(1)
            np.testing.assert_allclose(found[f"disagreement {kind}"][:, 1], expected, rtol=1e-3)


def test_systems_draw_each_as_it_was_made(flow: Path, students: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"name": name, "model": str(folder)} for name, folder in students.items()]
    config = {
        "systems": [{"name": "teacher", "model": str(flow), "steps": 4}, *rows],
        "num_prompts": 4,
        "reference_images": 8,
        "metrics": NAMES,
    }
    compare_systems(SystemsConfig.model_validate(config), tmp_path)
    found = {record.cell["name"]: record for record in read_records(tmp_path) if record.kind == "system"}
    assert {name: (record.nfe, record.guidance_scale) for name, record in found.items()} == {
        "teacher": (8, 3.0),
        "pd": (4, 1.0),
        "dmd2": (3, 1.0),
    }
    assert found["pd"].grid == [1000, 900, 750, 500] and found["dmd2"].grid == pytest.approx(TIMES)
