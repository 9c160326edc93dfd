"""Images of another size than the model's own: drawn as diffusers draws them, or refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddil_core.data.captioned import prepare_image
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.image_size import Geometry, image_size
from ddil_core.models.memory import estimate_memory
from ddil_core.models.model import load_model
from ddil_core.models.turns import take_turns
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.protocol import content_hash
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.experiments.results import hashed
from ddil_eval.experiments.systems import NOT_HASHED, SystemsConfig
from tests.core.closed_form import distance
from tests.pipelines import edited, save_pipeline
from tests.reference import PROMPTS, run_diffusers

SAMPLES = [Sample(prompt) for prompt in PROMPTS]
SEED = 3


def without_weights(folder: Path, to: Path) -> Path:
    """A copy of a pipeline whose weights are gone: reading one of them fails."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return to


@pytest.mark.parametrize("layout", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_unet_draws_wide_images_as_diffusers_does(layout: str, tmp_path: Path) -> None:
    import diffusers

    folder = save_pipeline(tmp_path, None, seed=1, layout=layout)
    model = load_model(str(folder), height=48, width=96)
    assert (model.image_size, model.latent_shape, model.asked_size) == ((48, 96), (8, 6, 12), True)
    if layout == "StableDiffusionXLPipeline":
        for condition in (model.encode(PROMPTS[:1]), model.nothing()):
            assert condition.tensors["time_ids"].tolist() == [[48, 96, 0, 0, 48, 96]]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z = initial_noise(SAMPLES, model.latent_shape, SEED)
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 48, "width": 96}
    latents, images = run_diffusers(pipeline, z, [sample.generator(SEED, "solver") for sample in SAMPLES], call)
    ours = sample_latents(model, SAMPLES, PROMPTS, resolve_sampling(model, 2, guidance_scale=5.0), SEED)
    assert distance(ours, latents) < 1e-5
    assert model.decode(ours).shape == images.shape == (2, 48, 96, 3)
    assert np.abs(model.decode(ours) / 255 - images).max() <= 1 / 255


def test_a_models_own_size_is_no_other_size(folder: Path) -> None:
    own, same = load_model(str(folder)), load_model(str(folder), height=64)
    assert (own.image_size, own.asked_size, same.asked_size, same.size) == ((64, 64), False, False, None)


OF_8 = "its autoencoder takes sides in multiples of 8 pixels; say"
OF_16 = "its autoencoder and its network's patches of 2 latents take sides in multiples of 16 pixels; say"
AT_MOST = "its network takes sides of at most 128 pixels; say 128 or less"


@pytest.mark.parametrize(
    ("layout", "size", "message"),
    [
        ("StableDiffusionPipeline", (60, None), f"height of 60: {OF_8} 56 or 64"),
        ("StableDiffusionPipeline", (64, 7), f"width of 7: {OF_8} 8"),
        ("StableDiffusion3Pipeline", (64, 72), f"width of 72: {OF_16} 64 or 80"),
        ("StableDiffusion3Pipeline", (144, None), f"height of 144: {AT_MOST}"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_before_weights_are_read(
    layout: str, size: tuple[int | None, int | None], message: str, tmp_path: Path
) -> None:
    folder = without_weights(save_pipeline(tmp_path, None, seed=1, layout=layout), tmp_path / "bare")
    with pytest.raises(WrongCommand) as error:
        load_model(str(folder), height=size[0], width=size[1])
    assert str(error.value) == f"the model {str(folder)!r} cannot draw images of a {message}"
    with pytest.raises(WrongCommand):
        image_size(str(folder), *size)


def test_the_size_that_a_student_was_made_for_is_its_own(folder: Path, tmp_path: Path) -> None:
    student = edited(folder, tmp_path / "student", "ddil.json", height=32, width=96)
    model = load_model(str(student))
    assert (model.image_size, model.latent_shape, model.asked_size) == ((32, 96), (8, 4, 12), False)
    assert image_size(str(student)) == (32, 96) and image_size(str(student), 64, None) == (64, 96)
    broken = edited(folder, tmp_path / "broken", "ddil.json", height=-8)
    with pytest.raises(DdilError, match="has the height -8; fetch or make the model again"):
        image_size(str(broken))


def test_models_of_different_sizes_cannot_take_turns(folder: Path) -> None:
    teacher, student = load_model(str(folder)), load_model(str(folder), width=96)
    with pytest.raises(WrongCommand) as error:
        take_turns(teacher, student)
    assert str(error.value) == (
        f"{str(folder)!r} draws images of 96 × 64 px and {str(folder)!r} of 64 × 64 px; give both one size with "
        "--height and --width (in Python, of load_model)"
    )


def test_tokens_are_counted_in_patches() -> None:
    geometry = Geometry((1024, 1024), 8, 2)
    assert (geometry.tokens((1024, 1024)), geometry.tokens((768, 1360))) == (4096, 48 * 85)


def test_decoding_a_larger_image_takes_more_memory(folder: Path) -> None:
    parameters = {"unet": 10, "vae": 10}
    own, large = (estimate_memory(folder, parameters, 4, size).sampling - 80 for size in (None, (128, 192)))
    assert large == own * 6 > 0


# Data and records


@pytest.mark.parametrize(("shape", "size"), [((40, 90), (20, 30)), ((90, 40), (20, 30)), ((60, 90), (20, 30))])
def test_an_image_is_cropped_to_the_shape_of_the_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """The centre is kept, and not squeezed: rows and columns of the result are as far apart as each other."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8)
    prepared = prepare_image(image, size).astype(float)
    assert prepared.shape == (*size, 3)
    scale = min(shape[0] / size[0], shape[1] / size[1])
    inner = prepared[4:-4, 4:-4]
    assert np.abs(np.diff(inner[..., 0], axis=0) - scale).max() <= 1 + 1e-9
    assert abs(np.diff(inner[..., 0], axis=0).mean() - scale) < 0.1
    assert abs(np.diff(inner[..., 1], axis=1).mean() - scale) < 0.1
    assert prepared[..., 0].mean() == pytest.approx((shape[0] - 1) / 2, abs=0.6)
    assert prepared[..., 1].mean() == pytest.approx((shape[1] - 1) / 2, abs=0.6)


def test_the_models_own_size_changes_no_hash() -> None:
    content: dict[str, Any] = {"systems": [{"name": "a", "model": "a"}]}
    protocol = SystemsConfig.model_validate(content).model_dump(mode="json")
    older = {key: value for key, value in protocol.items() if key not in ("height", "width")}
    assert content_hash(hashed(protocol, ())) == content_hash(hashed(older, ()))
    wide = SystemsConfig.model_validate(content | {"width": 96}).model_dump(mode="json")
    assert hashed(wide, ())["width"] == 96 and "width" not in hashed(wide, NOT_HASHED)  # a row names it itself
    assert "size" not in ImageOrigin("a").described()
    assert json.loads(json.dumps(ImageOrigin("a", size=(48, 96)).described()))["size"] == [48, 96]
