"""Models and data by reference: good and bad references, and encoding against diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import SYSTEM_FILE, Sampling
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance, normal

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_a_data_set_that_fits_nothing_names_the_nearest() -> None:
    with pytest.raises(WrongCommand) as error:
        open_data("shape")
    assert str(error.value) == (
        "the data set 'shape' is not known: it may be one of 'shapes', 'gaussians', 'coco2014:DIR', 'coco2017:DIR', 'folder:DIR', "
        "'webdataset:PATTERN'; did you mean 'shapes'?"
    )
    with pytest.raises(WrongCommand, match=r"'imagenet' is not known: it may be one of .*'webdataset:PATTERN'$"):
        open_data("imagenet")


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(WrongCommand) as error:
        load_model(str(tmp_path))
    assert str(error.value) == (
        f"the model '{tmp_path}' is a folder but no pipeline, as it has no model_index.json; "
        "name one in diffusers' pipeline layout"
    )


def test_a_run_without_a_student_yet(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("teacher: shapes\n")
    with pytest.raises(WrongCommand) as error:
        load_model(str(tmp_path))
    assert str(error.value) == (
        f"the model '{tmp_path}' is a run that has no student yet; finish it with 'ddil distill … --resume'"
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (lambda folder: cut(folder / UNET), f"the weights HERE/{UNET} are cut short or damaged ("),
    "weights empty": (
        lambda folder: (folder / UNET).write_bytes(b""),
        f"the weights HERE/{UNET} are cut short or damaged (",
    ),
    "text encoder cut": (
        lambda folder: cut(folder / "text_encoder/model.safetensors"),
        "the weights HERE/text_encoder/model.safetensors are cut short or damaged (",
    ),
    "index cut": (
        lambda folder: (folder / "model_index.json").write_text("{"),
        "the file HERE/model_index.json of the model is damaged",
    ),
    "sampling cut": (
        lambda folder: (folder / SYSTEM_FILE).write_text("{"),
        f"the file HERE/{SYSTEM_FILE} of the model is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pipeline_is_one_sentence(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    do, sentence = DAMAGE[damage]
    do(broken)
    with pytest.raises(DdilError) as error:
        load_model(str(broken))
    message = str(error.value).replace(str(broken), "HERE")
    assert message.startswith(sentence)
    assert message.endswith("; fetch or make the model again")
    assert "\n" not in message


@pytest.mark.parametrize("layout", ["KandinskyPipeline", ["pipeline", "OwnPipeline"]])
def test_another_layout_is_refused(folder: Path, tmp_path: Path, layout: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": layout}))
    with pytest.raises(DdilError) as error:
        load_model(str(tmp_path))
    assert str(error.value) == (
        f"the model '{tmp_path}' has the layout {layout}; known here are StableDiffusionPipeline, "
        "StableDiffusionXLPipeline, LatentConsistencyModelPipeline, StableDiffusion3Pipeline, FluxPipeline, "
        "PixArtSigmaPipeline, SanaPipeline, GaussiansPipeline"
    )


def test_how_a_model_is_sampled_stands_beside_it(model: Model, folder: Path, tmp_path: Path) -> None:
    assert model.sampling == Sampling(solver="ddim", steps=None, guidance_scale=3.0)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / SYSTEM_FILE).unlink()
    expected = Sampling("ddim", None, None, 7.5, spacing="trailing", offset=1)  # by its scheduler's configuration
    assert load_model(str(bare)).sampling == expected


def test_text_is_encoded_as_diffusers_does(model: Model) -> None:
    prompts = ["a small red circle", "a blue star", "a small red circle", ""]
    ours = model.encode(prompts, batch_size=2).tensors["encoder_hidden_states"]
    theirs, _ = model.pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    assert distance(ours, theirs) < 1e-6
    assert torch.equal(ours[0], ours[2])
    assert distance(ours[0], ours[1]) > 1e-3


def test_pictures_are_decoded_as_diffusers_does(model: Model) -> None:
    z = normal(3, *model.latent_shape) * 3
    ours = model.decode(z, batch_size=2)
    pixels = model.pipeline.vae.decode(z / model.pipeline.vae.config.scaling_factor, return_dict=False)[0].detach()
    theirs = model.pipeline.image_processor.postprocess(pixels, output_type="np")
    assert ours.shape == (3, 64, 64, 3)
    assert ours.dtype == np.uint8
    assert np.abs(ours - 255 * theirs).max() <= 0.5 + 1e-3


def test_the_hash_of_the_weights_sees_every_weight(model: Model, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "safety_checker").mkdir()
    for beside in ("unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"):
        shutil.copyfile(other / UNET, other / beside)  # not loaded, so not hashed
    before = load_model(str(other))
    assert before.weights_sha256() == model.weights_sha256()
    content = bytearray((other / UNET).read_bytes())
    content[-1] ^= 1
    (other / UNET).write_bytes(content)
    assert load_model(str(other)).weights_sha256() != model.weights_sha256()
    assert before.weights_sha256() == model.weights_sha256()  # of the weights in memory, not of the file of today


def test_the_pool_is_the_posterior_of_the_training_pictures(model: Model, pool: LatentPool) -> None:
    images, captions = open_data("shapes").batch(24, 0)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = model.pipeline.vae.encode(pixels).latent_dist
    scale = model.pipeline.vae.config.scaling_factor
    assert distance(pool.mean, posterior.mean * scale) < 1e-3  # float16
    assert distance(pool.std, posterior.std * scale) < 1e-3
    tensors = model.encode(captions).tensors
    assert pool.condition.keys() == tensors.keys()
    assert all(distance(pool.condition[name], tensors[name]) < 1e-3 for name in tensors)
    x0, row = pool.draw(4000, torch.Generator().manual_seed(0))
    spread = (x0 - pool.mean[row].float()) / pool.std[row].float()
    assert abs(float(spread.mean())) < 0.01
    assert abs(float(spread.var()) - 1) < 0.01
    assert set(row.tolist()) == set(range(24))


def test_the_pool_is_made_once_and_a_damaged_one_is_said(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    made = encode_pool(model, open_data("shapes"), 5, path, batch_size=2)
    written = path.stat().st_mtime_ns
    read = encode_pool(model, open_data("shapes"), 5, path)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(read.mean, made.mean)
    assert len(read) == 5
    assert set(load_file(path)) == {"mean", "std", "condition.encoder_hidden_states"}
    cut(path)
    with pytest.raises(DdilError) as error:
        encode_pool(model, open_data("shapes"), 5, path)
    assert str(error.value).startswith(f"the file of the encoded data {path} does not match its checksum")
    assert str(error.value).endswith("; delete the file to encode the data again")
    path.with_name("data.safetensors.sha256").unlink()  # as before files had checksums
    with pytest.raises(DdilError) as error:
        encode_pool(model, open_data("shapes"), 5, path)
    assert str(error.value) == f"the encoded data {path} is damaged; delete the file to encode the data again"


def test_a_model_loads_with_a_device_and_a_dtype_by_name(folder: Path) -> None:
    model = load_model(str(folder))
    assert (model.device, model.denoiser.net.dtype) == (torch.device("cpu"), torch.float32)
    for dtype in ("bfloat16", "bf16", torch.bfloat16):
        assert load_model(str(folder), "cpu", dtype).denoiser.net.dtype == torch.bfloat16
    with pytest.raises(
        WrongCommand, match=r"^this machine has no device 'tpu'; leave out --device to take the best one$"
    ):
        load_model(str(folder), "tpu")
    with pytest.raises(
        WrongCommand, match=r"^the dtype 'int8' is not known; it may be one of float32, bfloat16, float16"
    ):
        load_model(str(folder), dtype="int8")
