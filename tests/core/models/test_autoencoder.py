"""Scaling of latents against diffusers, unusable autoencoders, sizes of latents, and lengths of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import encode_pool, image_side
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.models.generate import sample, sampling_warnings
from ddil_core.models.memory import estimate_memory, latent_size
from ddil_core.models.model import Model, load_model
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.misfits import value_text
from tests.core.closed_form import distance, normal
from tests.pipelines import STUDENT, build, edited, save_pipeline, tiny_autoencoder, tiny_unet

MEAN, STD = [0.5, -0.3, 0.1, 1.2], [2.0, 0.5, 1.5, 0.8]
PROMPTS = ["a small red circle on a grey background", "a large blue star"]
VAE = "vae/config.json"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's layout with latents of 4 channels, which diffusers' pipeline needs with ``latents_mean``."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipeline = build("StableDiffusionXLPipeline", folder / "words", seed=1)
    sized = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    wide = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 6 * 8 + 16}
    torch.manual_seed(3)
    pipeline.register_modules(
        unet=tiny_unet(**sized, **wide, in_channels=4, out_channels=4),
        vae=tiny_autoencoder(latent_channels=4, latents_mean=MEAN, latents_std=STD, scaling_factor=0.4),
    )
    pipeline.vae.register_to_config(force_upcast=False)
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def theirs(folder: Path, model: Model, steps: int, guidance: float) -> np.ndarray:
    """Return the images of diffusers' pipeline from the same noise."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z = initial_noise([Sample(prompt, 0) for prompt in PROMPTS], model.latent_shape, 0)
    drawn = pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=z, output_type="np")
    images: np.ndarray = drawn.images * 255
    return images


def test_pictures_are_those_of_diffusers(sdxl: Path, tmp_path: Path) -> None:
    model = load_model(str(sdxl))
    ours = sample(model, PROMPTS, steps=4, guidance_scale=3.0)[:, 0].astype(float)
    expected = theirs(sdxl, model, 4, 3.0)
    assert np.abs(ours - expected).max() <= 1
    plain = load_model(str(edited(sdxl, tmp_path / "plain", VAE, latents_mean=None, latents_std=None)))
    assert np.abs(sample(plain, PROMPTS, steps=4, guidance_scale=3.0)[:, 0] - expected).max() > 5


def test_encoding_is_that_of_diffusers_and_undoes_decoding(sdxl: Path) -> None:
    model, pixels = load_model(str(sdxl)), normal(3, 3, 64, 64).clamp(-1, 1)
    mean, std = model.encode_images(pixels)
    posterior = model.pipeline.vae.encode(pixels).latent_dist
    centre, deviation = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    assert distance(mean, (posterior.mean - centre) * 0.4 / deviation) < 1e-6
    assert distance(std, posterior.std * 0.4 / deviation) < 1e-6
    image_to_image = diffusers.StableDiffusionXLImg2ImgPipeline(**model.pipeline.components)
    theirs = image_to_image.prepare_latents(
        pixels, torch.tensor([0]), 3, 1, torch.float32, "cpu", torch.Generator().manual_seed(0), add_noise=False
    )
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    assert distance(mean + std * noise, theirs) < 1e-5
    decoded = model.pipeline.vae.decode(posterior.mean).sample
    expected = (decoded * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert np.abs(model.decode(mean) - expected.detach().numpy()).max() <= 0.51


@pytest.mark.parametrize("layout", ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"])
def test_every_layout_and_the_training_data_are_scaled_alike(layout: str, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model", None, seed=1, layout=layout)
    mean, std = [0.1 * c - 0.3 for c in range(8)], [0.5 + 0.1 * c for c in range(8)]
    scaled = edited(folder, tmp_path / "scaled", VAE, latents_mean=mean, latents_std=std)
    plain, centred = load_model(str(folder)), load_model(str(scaled))
    said = [remark for remark in sampling_warnings(centred, PROMPTS, centred.sampling) if "latents_mean" in remark]
    assert said == [
        f"the latents_mean and latents_std of {str(scaled)!r} are applied here, and diffusers' {layout} ignores them"
    ]
    assert not any("latents_mean" in remark for remark in sampling_warnings(plain, PROMPTS, plain.sampling))
    z = normal(2, 8, 8, 8)
    factor = plain.pipeline.vae.config.scaling_factor
    columns = [torch.tensor(values).view(1, 8, 1, 1) for values in (mean, std)]
    assert (centred.decode(z) == plain.decode(z * columns[1] + columns[0] * factor)).mean() > 0.999
    pools = [
        encode_pool(model, open_data("shapes"), 4, tmp_path / f"{name}.safetensors")
        for name, model in (("plain", plain), ("centred", centred))
    ]
    assert distance(pools[1].mean, (pools[0].mean.float() - columns[0] * factor) / columns[1]) < 2e-3
    assert distance(pools[1].std, pools[0].std.float() / columns[1]) < 2e-3


@pytest.mark.parametrize(
    "keys",
    [
        {"latents_mean": MEAN, "latents_std": None},
        {"latents_mean": MEAN[:3]},
        {"latents_std": [1.0, 1.0, 0.0, 1.0]},
        {"latents_std": [1.0, 1.0, float("nan"), 1.0]},
        {"latents_mean": "none"},
        {"shift_factor": 0.1},
        {"scaling_factor": 0},
        {"scaling_factor": float("nan")},
        {"scaling_factor": 1e300},
        {"scaling_factor": 1e-45},
        {"latents_std": [1.0, 1.0, 1e-45, 1.0]},
        {"scaling_factor": None},
    ],
)
def test_a_scaling_that_cannot_be_meant_is_refused(sdxl: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    broken = edited(sdxl, tmp_path / "broken", VAE, **keys)
    with pytest.raises(DdilError) as error:
        load_model(str(broken))
    start = f"the autoencoder's configuration of the model {str(broken)!r} has "
    assert str(error.value).startswith(start) and "fetch the model again" in str(error.value)


def with_autoencoder(folder: Path, to: Path, autoencoder: Any) -> Path:
    """Copy a pipeline and replace its autoencoder."""
    import shutil

    index = edited(folder, to, "model_index.json", vae=["diffusers", type(autoencoder).__name__])
    shutil.rmtree(index / "vae")
    autoencoder.save_pretrained(index / "vae", safe_serialization=True)
    return index


@pytest.fixture(scope="module")
def tiny(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = diffusers.AutoencoderTiny(
        latent_channels=8, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    )  # fmt: skip
    return with_autoencoder(folder, tmp_path_factory.mktemp("tiny-vae") / "model", small)


def test_a_tiny_autoencoder_draws_and_teaches_nothing(tiny: Path, tmp_path: Path) -> None:
    assert sample(load_model(str(tiny)), PROMPTS, steps=1).shape == (2, 1, 64, 64, 3)
    config = METHODS["lcm"].config.model_validate({"updates": 1, "batch_size": 2, "pool": 4})
    with pytest.raises(DdilError) as error:
        distill(str(tiny), "shapes", config, tmp_path / "run", device="cpu")
    assert str(error.value) == (
        f"the model {str(tiny)!r} has an autoencoder of the class AutoencoderTiny, which gives no distribution of "
        "latents, so it cannot encode images; put the model's own AutoencoderKL in its place"
    )
    assert not (tmp_path / "run").exists()


def test_another_autoencoder_is_refused(folder: Path, tmp_path: Path) -> None:
    other = with_autoencoder(folder, tmp_path / "model", diffusers.VQModel(latent_channels=8, block_out_channels=(32,)))
    with pytest.raises(DdilError) as error:
        load_model(str(other))
    assert str(error.value) == (
        f"the model {str(other)!r} has an autoencoder of the class VQModel, which is not supported; the class may be "
        "AutoencoderKL or AsymmetricAutoencoderKL or AutoencoderDC or AutoencoderTiny"
    )


# The size of what is drawn


@pytest.mark.parametrize("layout", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_model_is_drawn_at_its_own_size(layout: str, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model", None, seed=1, layout=layout)
    square = edited(folder, tmp_path / "square", "unet/config.json", sample_size=[8, 8])
    same = [sample(load_model(str(path)), PROMPTS, steps=2) for path in (folder, square)]
    assert np.array_equal(*same)
    wide = load_model(str(edited(folder, tmp_path / "wide", "unet/config.json", sample_size=[8, 12])))
    assert wide.latent_shape == (8, 8, 12)
    drawn = sample(wide, PROMPTS, steps=2)
    assert drawn.shape == (2, 1, 64, 96, 3)
    if layout == "StableDiffusionXLPipeline":
        assert wide.encode(PROMPTS).tensors["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2


def test_a_wide_model_draws_what_diffusers_draws(folder: Path, tmp_path: Path) -> None:
    wide = edited(folder, tmp_path / "wide", "unet/config.json", sample_size=[8, 12])
    (wide / "ddil.json").unlink()
    model = load_model(str(wide))
    expected = theirs(wide, model, 4, 3.0)
    assert expected.shape == (2, 64, 96, 3)
    assert np.abs(sample(model, PROMPTS, steps=4, guidance_scale=3.0)[:, 0] - expected).max() <= 1


def test_a_wide_model_takes_no_square_data(folder: Path, tmp_path: Path) -> None:
    wide = edited(folder, tmp_path / "wide", "unet/config.json", sample_size=[8, 12])
    config = METHODS["pd"].config.model_validate({"stages": [{"steps": 2, "updates": 1}], "batch_size": 2, "pool": 4})
    with pytest.raises(WrongCommand) as error:
        distill(str(wide), "shapes", config, tmp_path / "run", device="cpu")
    assert str(error.value) == (
        f"the images of the data set 'shapes' have 64 x 64 pixels, and the teacher {str(wide)!r} draws 64 x 96; choose "
        "data or a teacher of the same size"
    )
    assert not (tmp_path / "run").exists()
    assert (image_side(load_model(str(folder))), image_side(load_model(str(wide)))) == (64, (64, 96))


@pytest.mark.parametrize("value", [None, [], [8], [8, 8, 8], [8, 0], "8", 0, -8, 8.5, [8, "8"], True])
def test_a_size_that_is_none_is_refused(folder: Path, tmp_path: Path, value: Any) -> None:
    broken = edited(folder, tmp_path / "broken", "unet/config.json", sample_size=value)
    with pytest.raises(DdilError) as error:
        load_model(str(broken))
    assert f"has the sample_size {value_text(value)} in its configuration" in str(error.value) and "\n" not in str(
        error.value
    )


def test_memory_is_estimated_for_any_size(folder: Path, tmp_path: Path) -> None:
    wide = edited(folder, tmp_path / "wide", "unet/config.json", sample_size=[8, 16])
    parameters = {"unet": 10, "vae": 10}
    decoding = [estimate_memory(path, parameters, 4).sampling - 80 for path in (folder, wide)]
    assert decoding[1] == 2 * decoding[0] > 0
    assert latent_size({"sample_size": 64}, "x") == latent_size({"sample_size": (64, 64)}, "x") == (64, 64)


# Tokenizers


@pytest.mark.parametrize("value", [..., 10**30, 512])
@pytest.mark.parametrize("layout", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_tokenizer_without_a_length_has_that_of_its_encoder(layout: str, value: Any, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model", STUDENT, seed=1, layout=layout)
    long = edited(folder, tmp_path / "long", "tokenizer/tokenizer_config.json", model_max_length=value)
    if layout == "StableDiffusionXLPipeline":
        path = long / "tokenizer_2" / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    plain, limited = load_model(str(folder)), load_model(str(long))
    assert limited.cut(["red " * 60]) == plain.cut(["red " * 60]) == 1
    for name, tensor in limited.encode(PROMPTS).tensors.items():
        torch.testing.assert_close(tensor, plain.encode(PROMPTS).tensors[name], rtol=0, atol=0)


def test_a_shorter_length_stays(folder: Path, tmp_path: Path) -> None:
    short = edited(folder, tmp_path / "short", "tokenizer/tokenizer_config.json", model_max_length=9)
    assert load_model(str(short)).pipeline.tokenizer.model_max_length == 9


def test_the_picture_on_disk_is_the_one_drawn(sdxl: Path, tmp_path: Path, cli: Any) -> None:
    """The command draws the same images."""
    out = tmp_path / "out"
    result = cli("sample", "--model", sdxl, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", 4, "--guidance", 3,
                 "--device", "cpu", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    expected = theirs(sdxl, load_model(str(sdxl)), 4, 3.0)
    drawn = np.stack([np.asarray(Image.open(out / f"{row:03d}-00.png").convert("RGB")) for row in range(2)])
    assert np.abs(drawn - expected).max() <= 1


@pytest.mark.parametrize("value", [-float("inf"), float("nan")])
def test_a_tiny_autoencoder_hides_no_infinity(tiny: Path, tmp_path: Path, value: float) -> None:
    """Its ReLUs turn −∞ into 0, so that the images are finite and wrong."""
    from safetensors.torch import load_file, save_file

    broken = edited(tiny, tmp_path / "broken", "vae/config.json")
    (path,) = (broken / "vae").glob("*.safetensors")
    weights = load_file(path)
    weights["decoder.layers.0.bias"][0] = value
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(DdilError, match=r"holds weights that are not finite, first in decoder\.layers\.0\.bias"):
        load_model(str(broken))
