"""Pipelines with parts that are missing, damaged or of another model: the message names the part and the cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddil_core.models.fit import empty_network, expected_shapes
from ddil_core.models.loading import load_pipeline
from ddil_core.models.model import Model, load_model
from ddil_core.models.system_specs import Files
from ddil_core.models.weights import pipeline_files, read_header, sets_of_weights
from ddil_core.support.errors import DdilError, WrongCommand
from tests.pipelines import save_pipeline

STEM = "diffusion_pytorch_model"
UNET = f"unet/{STEM}.safetensors"


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline to break."""
    shutil.copytree(folder, tmp_path / "broken")
    return tmp_path / "broken"


def refused(folder: Path, **options: object) -> str:
    with pytest.raises(DdilError) as error:
        load_model(str(folder), **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(folder), "HERE")


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(folder: Path, component: str, **values: object) -> None:
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


AGAIN = "fetch or make the model again"


def test_a_component_without_a_folder(broken: Path) -> None:
    shutil.rmtree(broken / "vae")
    assert refused(broken) == (
        f"the model 'HERE' names the component vae (AutoencoderKL), and there is no folder HERE/vae; {AGAIN}"
    )


def test_components_that_nothing_uses_may_be_absent(broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (broken / "model_index.json").write_text(json.dumps(index))
    assert load_model(str(broken)).pipeline.safety_checker is None


def test_a_file_that_is_cut_short_is_named(broken: Path) -> None:
    path = broken / UNET
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(broken)
    assert message.startswith(f"the weights HERE/{UNET} are cut short or damaged (") and message.endswith(f"; {AGAIN}")


def test_weights_that_are_absent(broken: Path) -> None:
    (broken / UNET).unlink()
    assert refused(broken) == f"the component unet of the model 'HERE' has no weights in HERE/unet; {AGAIN}"


def test_weights_that_are_a_pickle_name_the_command_that_converts_them(broken: Path) -> None:
    (broken / UNET).rename(broken / "unet" / f"{STEM}.bin")
    assert refused(broken) == (
        f"the component unet of the model 'HERE' has its weights only as a pickle (HERE/unet/{STEM}.bin), and a pickle "
        "can run code; make a copy in safetensors with: ddil models convert FOLDER OUT"
    )


def shard(folder: Path) -> list[Path]:
    """Replace the U-Net's file with two shards and an index."""
    weights = load_file(folder / UNET)
    names = sorted(weights)
    files = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        save_file({name: weights[name] for name in half}, folder / "unet" / file, metadata={"format": "pt"})
    place = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (folder / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    (folder / UNET).unlink()
    return [folder / "unet" / file for file in files]


def test_shards_load_as_one_file_does_and_an_absent_one_is_named(broken: Path, model: Model) -> None:
    first, second = shard(broken)
    loaded = load_model(str(broken)).pipeline.unet.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.pipeline.unet.state_dict().items())
    second.unlink()
    assert refused(broken) == f"the weights HERE/unet/{second.name} are not there; {AGAIN}"
    first.with_name(f"{STEM}.safetensors.index.json").write_text('{"weight_map": []}')
    assert refused(broken) == f"the file HERE/unet/{STEM}.safetensors.index.json of the model is damaged; {AGAIN}"


def test_weights_of_another_model(broken: Path) -> None:
    edit(broken / UNET, lambda weights: weights | {"conv_in.weight": torch.zeros(32, 8, 3, 3)})
    assert refused(broken) == (
        "the component unet of the model 'HERE' has weights of another model: conv_in.weight has the shape [32, 8, 3, "
        f"3] in HERE/{UNET} and [16, 8, 3, 3] by its config.json; put back its own, or {AGAIN}"
    )


def test_a_weight_that_is_absent_is_not_made_up(broken: Path) -> None:
    edit(broken / UNET, lambda weights: {name: weight for name, weight in weights.items() if "conv_out" not in name})
    assert refused(broken) == (
        f"the component unet of the model 'HERE' lacks weights: conv_out.weight is not in HERE/{UNET}, and 1 more; "
        f"put back its own, or {AGAIN}"
    )


def test_a_text_encoder_of_another_model(broken: Path) -> None:
    configure(broken, "text_encoder", hidden_size=32)
    assert refused(broken) == (
        "the component unet of the model 'HERE' takes text embeddings of 16 numbers, but its text_encoder gives 32: "
        f"the unet is of another model; put back the unet that belongs to this model, or {AGAIN}"
    )


def test_an_autoencoder_of_another_model(broken: Path) -> None:
    configure(broken, "vae", latent_channels=4)
    assert "the component vae of the model 'HERE' gives latents of 4 channels, but its unet takes 8" in refused(broken)


def test_a_tokenizer_of_another_model(broken: Path) -> None:
    configure(broken, "text_encoder", vocab_size=5)
    assert "words, but its text_encoder knows 5: the tokenizer is of another model" in refused(broken)


def test_the_attention_names_of_2022_are_read(broken: Path, model: Model) -> None:
    """The autoencoders of the first Stable Diffusion checkpoints have the old names."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(name: str) -> str:
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    edit(broken / f"vae/{STEM}.safetensors", lambda weights: {rename(name): weight for name, weight in weights.items()})
    loaded = load_model(str(broken)).pipeline.vae.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.pipeline.vae.state_dict().items())


def test_a_configuration_that_its_class_does_not_take(broken: Path) -> None:
    configure(broken, "unet", down_block_types=["NoSuchBlock", "DownBlock2D"])
    assert (
        "the component unet of the model 'HERE' has a configuration that does not fit, HERE/unet/config.json: "
        in refused(broken)
    )


def test_a_component_of_the_models_own_code_is_refused_and_not_imported(broken: Path) -> None:
    (broken / "unet" / "mine.py").write_text("raise SystemExit('run')")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"unet": ["mine", "MyUNet"]}))
    assert refused(broken) == (
        "the component unet of the model 'HERE' is of the class mine.MyUNet, and only classes of diffusers and "
        "transformers and ddil_core.gaussians.networks are loaded, so that no code of a model runs"
    )


@pytest.mark.parametrize("named", [["diffusers", "UNet2DConditionModel"], ["diffusers", "DiffusionPipeline"], None])
def test_a_scheduler_that_is_none_is_refused_and_its_folder_not_opened(
    broken: Path, named: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class would open a pickle."""
    index = json.loads((broken / "model_index.json").read_text())
    del index["scheduler"]
    (broken / "model_index.json").write_text(json.dumps(index if named is None else index | {"scheduler": named}))
    shutil.copy(broken / "unet" / "config.json", broken / "scheduler" / "config.json")
    opened: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args))
    torch.save({}, broken / "scheduler" / f"{STEM}.bin")
    told = "none" if named is None else named[1]
    assert refused(broken).startswith(f"the scheduler of the model 'HERE' is {told} by its model_index.json, which is")
    assert not opened


def test_expected_shapes_are_those_of_the_network(folder: Path, model: Model) -> None:
    shapes = expected_shapes(empty_network(folder / "unet", "diffusers", "UNet2DConditionModel", "x"))
    assert shapes == {name: tuple(weight.shape) for name, weight in model.pipeline.unet.named_parameters()}
    with pytest.raises(DdilError, match=r"^x is of the class os.system, which is not supported$"):
        empty_network(folder / "unet", "os", "system", "x")


# Variants and dtypes


def test_variants_and_dtypes(broken: Path, model: Model) -> None:
    whole = load_file(broken / UNET)
    half = {name: weight.half() for name, weight in whole.items()}
    save_file(half, broken / "unet" / f"{STEM}.fp16.safetensors", metadata={"format": "pt"})
    plain = load_model(str(broken)).pipeline.unet.state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in whole.items())
    chosen = load_model(str(broken), variant="fp16", dtype=torch.float16).pipeline
    assert all(torch.equal(weight, half[name]) for name, weight in chosen.unet.state_dict().items())
    assert chosen.text_encoder.dtype == torch.float16
    with pytest.raises(WrongCommand) as error:
        load_model(str(broken), variant="fp8")
    assert str(error.value) == f"the model '{broken}' has no weights of the variant 'fp8' here; it has fp16"
    (broken / UNET).unlink()
    assert pipeline_files(broken, "x").variant == "fp16"
    assert "HERE/unet, and the variants here are bf16, fp16; choose with --variant" in (
        shutil.copy(broken / "unet" / f"{STEM}.fp16.safetensors", broken / "unet" / f"{STEM}.bf16.safetensors")
        and refused(broken)
    )


def test_names_of_weights() -> None:
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "model.bin",
        "flax_model.msgpack",
        "model.safetensors.index.json",
    ]
    assert sets_of_weights(names) == {None: ["model.safetensors"], "fp16": ["model.fp16.safetensors"]}
    assert sets_of_weights(["model-00001-of-00002.safetensors"]) == {}  # shards of which no index tells


def test_headers(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 2, dtype=torch.bfloat16), "b": torch.zeros(5), "c": torch.zeros(7, dtype=torch.bool)}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (entry.shape, entry.nbytes) for name, entry in header.items()} == {
        "a": ((3, 2), 12), "b": ((5,), 20), "c": ((7,), 7),
    }  # fmt: skip


# A U-Net in place of a pipeline's own


def test_a_replaced_unet_is_the_one_that_is_loaded(folder: Path, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    own = {name: weight + 1 for name, weight in model.pipeline.unet.state_dict().items()}
    save_file(own, path)
    files = Files(folder, unet=path)
    loaded = load_pipeline(files, "ours", "StableDiffusionPipeline", torch.float32).unet.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in own.items())
    half = load_pipeline(files, "ours", "StableDiffusionPipeline", torch.bfloat16).unet
    assert half.dtype == torch.bfloat16 and torch.equal(half.conv_in.weight, own["conv_in.weight"].bfloat16())
    save_file(own | {"conv_in.weight": torch.zeros(320, 4, 3, 3)}, path)
    with pytest.raises(DdilError) as error:
        load_pipeline(files, "ours", "StableDiffusionPipeline", torch.float32)
    assert str(error.value).startswith(
        f"the U-Net {path} for 'ours' has weights of another model: conv_in.weight has the shape [320, 4, 3, 3] in "
        f"{path} and [16, 8, 3, 3] by its config.json; put back its own"
    )
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DdilError, match=f"^the weights {path} are cut short or damaged"):
        load_pipeline(files, "ours", "StableDiffusionPipeline", torch.float32)


# Text encoders: transformers fills a missing weight with random numbers


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_a_text_encoder_that_lacks_a_weight(tmp_path: Path, component: str) -> None:
    folder = save_pipeline(tmp_path, None, seed=1, layout="StableDiffusion3Pipeline", t5=True)
    path = folder / component / "model.safetensors"
    whole = load_file(path)
    dropped = sorted(name for name in whole if "layer" in name)[3]
    edit(path, lambda state: {name: weight for name, weight in state.items() if name != dropped})
    assert refused(folder) == (
        f"the component {component} of the model 'HERE' lacks weights: {dropped.removeprefix('text_model.')} is not in "
        f"HERE/{component}/model.safetensors; put back its own, or {AGAIN}"
    )
    if component == "text_encoder_3":  # T5's words have two names, and a file may have either
        save_file(
            {name.replace("shared.", "encoder.embed_tokens."): w for name, w in whole.items()}, path, {"format": "pt"}
        )
        made = load_model(str(folder)).pipeline.text_encoder_3
        assert torch.equal(made.shared.weight, whole["shared.weight"])
