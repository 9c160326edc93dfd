"""Single-file checkpoints: recorded predictions, missing weights and surplus weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from ddil_core.models.checkpoint import check_checkpoint, recorded_prediction, wanted_weights
from ddil_core.models.model import load_model
from ddil_core.models.original import unet_layer
from ddil_core.models.references import resolve
from ddil_core.support.errors import DdilError, WrongCommand
from tests.pipelines import build, tell_apart
from tests.single_file import single_file

Files = dict[str, tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """For each version: the configuration as a pipeline folder, and the tensors of a single file."""
    made = {}
    for version in ("1", "2", "xl"):
        folder = tmp_path_factory.mktemp(f"version-{version}")
        pipeline = build(
            "StableDiffusionXLPipeline" if version == "xl" else "StableDiffusionPipeline", folder / "words"
        )
        if version == "xl":
            tell_apart(pipeline)
        pipeline.save_pretrained(folder / "pipeline")
        made[version] = folder / "pipeline", single_file(pipeline, version)
    return made


# What a file says that it predicts


@pytest.mark.parametrize(
    ("keys", "metadata", "prediction"),
    [
        ((), {}, None),
        (("v_pred",), {}, "v_prediction"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction"),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ((), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ((), {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ((), {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None),
        (("v_pred",), {"modelspec.prediction_type": "v"}, "v_prediction"),
    ],
)
def test_markers_and_metadata_say_what_is_predicted(
    tmp_path: Path, keys: tuple[str, ...], metadata: dict[str, str], prediction: str | None
) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"weight": torch.ones(1)} | {key: torch.tensor([]) for key in keys}, path, metadata=metadata)
    assert recorded_prediction(path) == prediction


@pytest.mark.parametrize(
    ("keys", "metadata", "sentence"),
    [
        (
            ("ztsnr",),
            {},
            "was trained with zero terminal SNR (ztsnr), which is not supported; use a model trained without it",
        ),
        (("v_pred", "ztsnr"), {}, "was trained with zero terminal SNR (ztsnr)"),
        ((), {"ss_zero_terminal_snr": "True"}, "was trained with zero terminal SNR"),
        (("edm_mean", "edm_std"), {}, "was trained with EDM's preconditioning (edm_mean), which is not supported"),
        (("edm_vpred.sigma_max",), {}, "was trained with EDM's preconditioning (edm_vpred.sigma_max)"),
        ((), {"modelspec.prediction_type": "x0"}, "predicts 'x0' (modelspec.prediction_type), which is not supported"),
        (
            ("v_pred",),
            {"modelspec.prediction_type": "epsilon"},
            "predicts v_prediction (v_pred) and epsilon (modelspec.prediction_type); use a copy that says one of them",
        ),
    ],
)
def test_what_a_file_says_and_is_not_known_is_refused(
    files: Files, tmp_path: Path, keys: tuple[str, ...], metadata: dict[str, str], sentence: str
) -> None:
    folder, state = files["xl"]
    path = tmp_path / "one.safetensors"
    save_file(state | {key: torch.tensor([1.0]) for key in keys}, path, metadata=metadata)
    with pytest.raises(WrongCommand) as error:
        load_model(f"{folder}:{path}")
    assert str(error.value).startswith(f"the file {path} says that its model {sentence}")


@pytest.mark.parametrize("version", ["1", "2", "xl"])
def test_a_file_that_predicts_v_is_read_so(files: Files, tmp_path: Path, version: str) -> None:
    """The folder's scheduler says epsilon, and the file says v. The file counts: x̂ is α z − σ v."""
    folder, state = files[version]
    path = tmp_path / "one.safetensors"
    save_file(state, path)
    plain = load_model(f"{folder}:{path}")
    save_file(state | {"v_pred": torch.tensor([])}, path)
    marked = load_model(f"{folder}:{path}")
    assert (plain.denoiser.prediction, marked.denoiser.prediction) == ("epsilon", "v_prediction")
    assert marked.pipeline.scheduler.config.prediction_type == "v_prediction"
    z, out, t = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8), torch.tensor([500, 999])
    squares = plain.pipeline.scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    expected = squares.sqrt() * z - (1 - squares).sqrt() * out
    torch.testing.assert_close(marked.denoiser.x0(out, z, t), expected, rtol=1e-4, atol=1e-5)


def test_the_file_counts_more_than_the_system(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of systems.yaml says epsilon for SDXL. Stable Diffusion 2 needs no name if the file says v."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name, version in (
        ("stabilityai/stable-diffusion-xl-base-1.0", "xl"),
        ("stabilityai/stable-diffusion-2-1", "2"),
    ):
        storage = cache / f"models--{name.replace('/', '--')}"
        (storage / "refs").mkdir(parents=True)
        (storage / "refs" / "main").write_text("0" * 40)
        (storage / "snapshots").mkdir()
        (storage / "snapshots" / ("0" * 40)).symlink_to(files[version][0])
        path = tmp_path / f"{version}.safetensors"
        save_file(files[version][1] | {"v_pred": torch.tensor([])}, path)
        for reference in (str(path), f"{'sdxl' if version == 'xl' else 'sd21'}:{path}"):
            assert resolve(reference).prediction == "v_prediction"
            assert load_model(reference).denoiser.prediction == "v_prediction"


def test_a_file_of_version_2_that_predicts_epsilon_needs_its_folder(files: Files, tmp_path: Path) -> None:
    folder, state = files["2"]
    path = tmp_path / "one.safetensors"
    save_file(state, path, metadata={"modelspec.architecture": "stable-diffusion-v2-512"})
    with pytest.raises(
        WrongCommand, match="says that it predicts epsilon, and no system has such settings; name a pipeline"
    ):
        resolve(str(path))
    assert resolve(f"{folder}:{path}").prediction == "epsilon"


# Weights that a file lacks, or has too many of

GROUPS: list[tuple[str, str, str]] = [
    ("1", "model.diffusion_model.", "U-Net"),
    ("1", "first_stage_model.", "autoencoder"),
    ("2", "model.diffusion_model.", "U-Net"),
    ("xl", "first_stage_model.", "autoencoder"),
    ("xl", "conditioner.embedders.0.", "text encoder"),
]


def sentence_about(path: Path, folder: Path) -> str:
    with pytest.raises(DdilError) as error:
        check_checkpoint(path, folder)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"the file {path} ")


@pytest.mark.parametrize(("version", "prefix", "name"), GROUPS)
def test_a_file_without_a_network(files: Files, tmp_path: Path, version: str, prefix: str, name: str) -> None:
    folder, state = files[version]
    path = tmp_path / "one.safetensors"
    save_file({key: tensor for key, tensor in state.items() if not key.startswith(prefix)}, path)
    sentence = sentence_about(path, folder)
    assert sentence.startswith(f"holds no {name}: {prefix}") and sentence.endswith(
        "are not in it; fetch or make the model again, or name a system or a pipeline folder of the same layout, as in "
        "FOLDER:FILE"
    )
    with pytest.raises(DdilError, match=f"holds no {name}"):
        load_model(f"{folder}:{path}")


@pytest.mark.parametrize("version", ["1", "2", "xl"])
def test_every_weight_is_looked_for_by_its_name_in_the_file(files: Files, tmp_path: Path, version: str) -> None:
    folder, state = files[version]
    names = {name for weights in wanted_weights(folder, state).values() for name in weights}
    assert names == set(state)
    path = tmp_path / "one.safetensors"
    for key in sorted(state)[::60]:
        save_file({name: tensor for name, tensor in state.items() if name != key}, path)
        assert f": {key} is not in it;" in sentence_about(path, folder)


@pytest.mark.parametrize(("layout", "tensors"), [("sd", 686), ("sdxl", 1680)])
def test_the_names_of_the_real_sizes_are_those_that_diffusers_reads(layout: str, tensors: int) -> None:
    """The U-Nets of Stable Diffusion 1 and SDXL on the meta device: our names, and diffusers' names from them."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    large = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(large if layout == "sdxl" else {}))
    named = {}
    for name, weight in unet.state_dict().items():
        layer, _, end = name.rpartition(".")
        named[f"model.diffusion_model.{unet_layer(layer, unet.config)}.{end}"] = weight
    assert len(named) == tensors
    back = convert_ldm_unet_checkpoint(named, unet.config)
    assert {name: weight.shape for name, weight in back.items()} == {n: w.shape for n, w in unet.state_dict().items()}


def test_an_autoencoder_under_its_other_prefix(files: Files, tmp_path: Path) -> None:
    folder, state = files["1"]
    path = tmp_path / "one.safetensors"
    save_file({name.replace("first_stage_model.", "vae."): tensor for name, tensor in state.items()}, path)
    ours = load_model(f"{folder}:{path}").pipeline.vae.state_dict()
    save_file(state, path)
    theirs = load_model(f"{folder}:{path}").pipeline.vae.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_one_missing_weight_is_refused_when_a_model_loads(files: Files, tmp_path: Path) -> None:
    """A missing weight of a text encoder once stayed on the meta device and failed only with the first prompt."""
    folder, state = files["xl"]
    key = "conditioner.embedders.1.model.ln_final.bias"
    path = tmp_path / "one.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name != key}, path)
    with pytest.raises(DdilError, match=f"lacks weights of the second text encoder: {key} is not in it;"):
        load_model(f"{folder}:{path}")


def test_layers_without_a_place_and_other_shapes(files: Files, tmp_path: Path) -> None:
    folder, state = files["1"]
    path = tmp_path / "one.safetensors"
    extra = "model.diffusion_model.input_blocks.3.1.transformer_blocks.1.attn1.to_q.weight"
    save_file(state | {extra: torch.ones(16, 16)}, path)
    assert sentence_about(path, folder).startswith(
        f"has weights that the U-Net configured in {folder} has no place for: {extra};"
    )
    nine = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(state | {nine: torch.ones(16, 9, 3, 3)}, path)
    assert sentence_about(path, folder).startswith(
        f"has weights of another model than {folder}: {nine} has the shape [16, 9, 3, 3], and [16, 8, 3, 3] by the "
        "configuration"
    )


def test_averages_and_notes_beside_the_weights_are_left_alone(files: Files, tmp_path: Path) -> None:
    folder, state = files["2"]
    path = tmp_path / "one.safetensors"
    notes = {f"model_ema.{i}": torch.ones(1) for i in range(3)} | {"betas": torch.ones(2)}
    layer = "cond_stage_model.model.transformer.resblocks.1.ln_1.weight"  # version 2 leaves out the last layer
    save_file(state | notes | {layer: torch.ones(16), "cond_stage_model.model.logit_scale": torch.ones(())}, path)
    check_checkpoint(path, folder)
    averages = {key.replace("model.diffusion_model.", "model_ema."): tensor for key, tensor in state.items()}
    save_file(averages, path)
    assert sentence_about(path, folder).startswith("holds no U-Net: model.diffusion_model.")
