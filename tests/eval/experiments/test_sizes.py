"""Experiments at another size than the model's own: turns, drift and distillation of images that are no squares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.diffusion.schedule import FlowSchedule
from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.models.model import load_model
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig, analyse_covariate_shift
from ddil_eval.report.records import SETTING
from tests.pipelines import save_pipeline
from tests.records import record

SIZE = (32, 64)
FLOW = {"solver": "flow_euler", "guidance_scale": 3.0}
STUDENT = {"solver": "flow_euler", "steps": 2, "guidance_scale": 1.0}


def test_flux_takes_turns_and_drifts_at_any_size(pixel_metrics: tuple[str, ...], tmp_path: Path) -> None:
    folders = [
        save_pipeline(tmp_path / str(seed), sampling, seed=seed, layout="FluxPipeline")
        for seed, sampling in ((1, FLOW), (2, STUDENT))
    ]
    grid = load_model(str(folders[0]), height=SIZE[0], width=SIZE[1]).denoiser.schedule.grid(2)
    config = CovariateShiftConfig(
        teacher=str(folders[0]), student=str(folders[1]), height=SIZE[0], width=SIZE[1], teacher_steps=4,
        switch=(grid[1],), num_prompts=10, reference_images=10, metrics=("brightness",), figure_prompts=0, drift=True,
    )  # fmt: skip
    records = analyse_covariate_shift(config, tmp_path / "out")
    assert {record.size for record in records} == {SIZE}
    turns, drift = ([r for r in records if r.experiment == name] for name in ("covariate-shift", "drift"))
    assert all(record.grid == grid for record in turns)
    assert [r.grid for r in drift] == [grid] * len(drift) and len(drift) > 0
    both = {r.metrics["brightness"].estimate.value for r in turns if r.kind == "pure"}
    assert len(both) == 2
    ratio = next(r for r in drift if "shift_ratio" in r.metrics and r.cell.get("t") == "all")
    assert ratio.metrics["shift_ratio"].estimate.value > 0
    square = load_model(str(folders[0]), height=64, width=64).denoiser.schedule
    assert isinstance(square, FlowSchedule) and square.grid(2) != grid  # times depend on the number of tokens


def test_a_record_of_the_models_own_size_keeps_its_identity() -> None:
    own = record({"kind": "pure", "model": "teacher"})
    assert own.size is None and own.identity() == own.digest_of({"cell", *SETTING} - {"size"})
    assert own.model_copy(update={"size": SIZE}).identity() != own.identity()


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 70 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a small red circle")
    return f"folder:{folder}"


def test_a_student_of_wide_images_keeps_their_size(teacher: Path, photographs: str, tmp_path: Path) -> None:
    config = METHODS["pd"].config.model_validate(
        {"stages": [{"steps": 2, "updates": 1}], "batch_size": 2, "pool": 4, "height": SIZE[0], "width": SIZE[1]}
    )
    student = distill(str(teacher), photographs, config, tmp_path / "run", device="cpu")
    made = json.loads((student / "ddil.json").read_text())
    assert (made["height"], made["width"]) == SIZE
    model = load_model(str(tmp_path / "run"))
    assert (model.image_size, model.latent_shape) == (SIZE, (8, 4, 8))
    assert not model.asked_size
