"""From every kind of data to a student that loads: a few updates of a tiny teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.distill import distill
from ddil_core.models.model import load_model
from ddil_core.support.errors import WrongCommand
from tests.coco import photograph, save_coco
from tests.shards import save_shards

COUNT = 6
CONFIG = ProgressiveConfig.model_validate(
    {
        "stages": [{"steps": 2, "updates": 2}],
        "batch_size": 4,
        "pool": COUNT,
        "ddil": {"collect_every": 2, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]},
        "watch": {"every": 2, "prompts": 2, "images": 2},
    }
)
PLAIN = CONFIG.model_copy(update={"watch": None, "ddil": None})


def save_folder(folder: Path) -> str:
    folder.mkdir()
    for place in range(COUNT):
        Image.fromarray(photograph(place)).save(folder / f"{place}.jpg")
        (folder / f"{place}.txt").write_text("a small red circle")
    return f"folder:{folder}"


def save_year(folder: Path, year: int) -> str:
    save_coco(folder, COUNT, year, "train")
    save_coco(folder, COUNT, year)
    return f"coco{year}:{folder}"


def save_data(folder: Path, kind: str) -> str:
    if kind == "coco2014":
        return save_year(folder, 2014)
    if kind == "folder":
        return save_folder(folder)
    folder.mkdir()
    return save_shards(folder, 2, COUNT // 2)


@pytest.mark.parametrize("kind", ["folder", "coco2014", "webdataset"])
def test_a_student_is_distilled_from(kind: str, folder: Path, tmp_path: Path) -> None:
    data, out = save_data(tmp_path / "data", kind), tmp_path / "run"
    student = distill(str(folder), data, CONFIG, out, device="cpu")
    assert student == out / "student"
    trained, before = (dict(load_model(str(model)).denoiser.net.named_parameters()) for model in (out, folder))
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    pipeline = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a small red circle", num_inference_steps=2, guidance_scale=1.0).images
    assert picture.size == (64, 64)


def test_once_encoded_the_images_are_looked_at_no_more(folder: Path, tmp_path: Path) -> None:
    data, out = save_year(tmp_path / "data", 2017), tmp_path / "run"
    student = distill(str(folder), data, PLAIN, out, device="cpu")
    trained = load_file(student / "unet" / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(student)
    shutil.rmtree(tmp_path / "data" / "train2017")
    distill(str(folder), data, PLAIN, out, device="cpu", resume=True)
    again = load_file(student / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)


def test_another_method_takes_the_same_data(folder: Path, tmp_path: Path) -> None:
    config = ConsistencyConfig(updates=2, batch_size=2, pool=COUNT, warmup=1)
    distill(str(folder), save_folder(tmp_path / "data"), config, tmp_path / "run", device="cpu")
    assert load_model(str(tmp_path / "run")).sampling.solver == "lcm"


def test_images_are_prepared_to_the_teachers_size_and_the_shapes_keep_theirs(folder: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    config = teacher / "unet" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": 6'))
    run = tmp_path / "run"
    distill(str(teacher), save_folder(tmp_path / "data"), PLAIN, run, device="cpu")
    assert load_model(str(run)).latent_shape == (8, 6, 6)
    with pytest.raises(WrongCommand, match="'shapes' have 64 x 64 pixels, and the teacher .* draws 48 x 48"):
        distill(str(teacher), "shapes", PLAIN, tmp_path / "other", device="cpu")


def test_a_pool_that_is_too_large_is_refused_before_a_folder_is_made(folder: Path, tmp_path: Path) -> None:
    data = save_shards(tmp_path, 2, 2)
    with pytest.raises(WrongCommand) as error:
        distill(str(folder), data, CONFIG, tmp_path / "run", device="cpu")
    assert str(error.value) == (
        f"{data} has 4 images to train on, fewer than the pool of 6; add others, or say --set pool=4"
    )
    assert not (tmp_path / "run").exists()
