"""References to systems, folders, single files and a user's own files as a system; and refused references."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from ddil_core.models.catalogue import list_models, parameters
from ddil_core.models.model import Model, load_model
from ddil_core.models.references import SHIPPED, hub_parts, resolve
from ddil_core.models.system_specs import load_systems
from ddil_core.support.errors import DdilError, WrongCommand
from tests.pipelines import build, tiny_unet
from tests.single_file import single_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def refused(reference: str) -> str:
    with pytest.raises(WrongCommand) as error:
        resolve(reference)
    return str(error.value)


ACCEPTED = (
    "it may be a name that 'ddil models' lists, a folder in diffusers' pipeline layout, a run folder of 'ddil "
    "distill', a single-file checkpoint (.safetensors), or a hub id, as in org/name or org/name@revision"
)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("shaps", "; did you mean shapes or shapes-flow?"),
        ("sd1.5", "; did you mean sd15 or sd35 or sd21?"),
        ("zebra", ""),
        ("a/b/c/d", ""),
    ],
)
def test_a_reference_that_fits_nothing(name: str, hint: str) -> None:
    assert refused(name) == f"the model {name!r} is not known: {ACCEPTED}{hint}"


def test_a_hub_id_that_is_not_cached_says_how_to_get_it() -> None:
    assert refused("nobody/nothing@abc") == (
        "the model 'nobody/nothing@abc' is no folder, and as a model of the hub it is not here; get it with: "
        "ddil models download nobody/nothing@abc, or add --download (in Python: download=True)"
    )


def test_every_system_resolves_or_says_how_to_get_it() -> None:
    for name, row in load_systems().items():
        sentence = refused(name)
        if name == "dmd":
            assert sentence == (
                "the model 'dmd' has no public weights as far as known; name a folder in diffusers' pipeline layout, "
                "as in dmd:FOLDER"
            )
        elif row.unet is not None and row.unet.file.endswith(".bin"):
            assert "is published as a pickle" in sentence and f"name the model {name}:" in sentence
        else:
            cure = f"ddil models download {name}, or add --download (in Python: download=True)"
            assert sentence.endswith(f"; get it with: {cure}")


def test_the_shipped_model_and_folders_need_nothing_of_a_hub(folder: Path) -> None:
    for reference in (*SHIPPED, str(folder), f"dmd:{folder}", "zebra"):
        assert hub_parts(reference) == []


def test_a_folder_as_a_system(folder: Path) -> None:
    files = resolve(f"dmd:{folder}")
    assert (files.folder, files.system, files.unet) == (folder, load_systems()["dmd"], None)
    assert refused("dmd:nowhere") == "the model 'dmd:nowhere' names nowhere, and there is no such file or folder"


def test_a_run_folder_is_its_student(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("teacher: shapes\n")
    (tmp_path / "student").symlink_to(folder)
    assert resolve(str(tmp_path)).folder == tmp_path / "student"


# Single files


@pytest.fixture
def checkpoint(model: Model, tmp_path: Path) -> Path:
    """The tiny pipeline as one file, with the names of Stable Diffusion's first release."""
    path = tmp_path / "tiny.safetensors"
    save_file(single_file(model.pipeline), path)
    return path


@pytest.mark.parametrize("version", ["1", "2", "xl"])
def test_a_single_file_loads_as_its_pipeline_does(tmp_path: Path, version: str) -> None:
    layout = "StableDiffusionXLPipeline" if version == "xl" else "StableDiffusionPipeline"
    pipeline = build(layout, tmp_path / "words")
    if version == "xl":  # diffusers tells the two encoders apart by their width, 768 and 1280 in the real ones
        wide = copy.deepcopy(pipeline.text_encoder_2.config)
        wide.hidden_size = 24
        pipeline.register_modules(
            text_encoder_2=type(pipeline.text_encoder_2)(wide),
            unet=tiny_unet(
                addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=40,
                projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
            ),
        )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "folder")
    save_file(single_file(pipeline, version), tmp_path / "one.safetensors")
    for network in (tmp_path / "folder").rglob("*.safetensors"):
        network.unlink()  # nothing but the configuration is taken from there
    made = load_model(f"{tmp_path / 'folder'}:{tmp_path / 'one.safetensors'}")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if version == "xl" else 3]:
        ours, theirs = (getattr(one, part).state_dict() for one in (made.pipeline, pipeline))
        assert set(ours) == set(theirs)
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items()), part
    pipeline.set_progress_bar_config(disable=True)
    theirs, ours = (
        one.encode_prompt("a red circle", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        for one in (pipeline, made.pipeline)
    )
    assert torch.equal(ours, theirs)


def test_a_single_file_in_another_dtype(checkpoint: Path, folder: Path) -> None:
    pipeline = load_model(f"{folder}:{checkpoint}", dtype=torch.bfloat16).pipeline
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}


def test_a_single_file_needs_a_configuration(checkpoint: Path) -> None:
    assert refused(str(checkpoint)) == (
        f"the file {checkpoint} holds only weights, and the configuration of sd15 that it needs is not here; get it "
        f"with: ddil models download sd15 --config-only, or name a pipeline of the same layout, as in "
        f"FOLDER:{checkpoint}"
    )


def test_a_single_file_of_stable_diffusion_2_needs_its_system_named(tmp_path: Path) -> None:
    """Some predict v and some ε, and the file does not say which."""
    path = tmp_path / "two.safetensors"
    save_file(single_file(build("StableDiffusionPipeline", tmp_path / "words"), "2"), path)
    assert refused(str(path)) == (
        f"the file {path} is one of Stable Diffusion 2, and does not say whether it predicts v or ε; name the system "
        f"with the same settings, as in sd21:{path} for v at 768 pixels, or a pipeline folder, as in FOLDER:{path}"
    )


def test_a_single_file_that_is_cut_short(checkpoint: Path, folder: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-8])
    with pytest.raises(DdilError, match=rf"^the weights {checkpoint} are cut short or damaged \("):
        load_model(f"{folder}:{checkpoint}")


def test_files_that_are_no_whole_model(folder: Path, tmp_path: Path) -> None:
    assert refused(str(folder / UNET)) == (
        f"the file {folder / UNET} holds no text encoder as Stable Diffusion's single files do, so it is no whole "
        "model; a U-Net or a LoRA goes onto a system, as in dmd2:FILE or lcm-lora:FILE"
    )
    for name in ("x.ckpt", "x.txt"):
        (tmp_path / name).write_text("x")
    out = tmp_path / "x.safetensors"
    assert refused(str(tmp_path / "x.ckpt")) == (
        f"{tmp_path / 'x.ckpt'} is a pickle, which can run code; turn it into safetensors with: "
        f"ddil models convert {tmp_path / 'x.ckpt'} {out}"
    )
    assert (
        refused(str(tmp_path / "x.txt"))
        == f"{tmp_path / 'x.txt'} is no file of weights; name one that ends in .safetensors"
    )


# Counting and listing


def test_parameters_are_counted_from_headers(folder: Path, checkpoint: Path, model: Model) -> None:
    true = {
        name: sum(weight.numel() for weight in getattr(model.pipeline, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    assert parameters(str(folder))[1] == true
    assert parameters(f"{folder}:{checkpoint}") == (folder, true)


def test_the_listing_names_what_was_not_read_at_its_source() -> None:
    rows = {row["name"]: row for row in list_models()}
    assert list(rows) == ["shapes", "shapes-flow", "gaussians", *load_systems()]
    assert (rows["sd15"]["licence"], rows["sd15"]["revision"]) == ("unverified", "unverified")
    assert rows["ssd1b"]["revision"] == load_systems()["ssd1b"].revision
    assert not any(row["here"] or row["bytes"] for name, row in rows.items() if name not in SHIPPED)
    assert all(row["needs"] for name, row in rows.items() if name not in SHIPPED)
    assert rows["dmd2"]["source"] == "stabilityai/stable-diffusion-xl-base-1.0 + tianweiy/DMD2/dmd2_sdxl_4step_unet.bin"
    json.dumps(list_models())
