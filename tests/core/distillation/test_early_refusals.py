"""What a teacher cannot be distilled by is refused before its weights are read: here they are no weights at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ddil_core.distillation.distill import distill
from ddil_core.models.model import assemble
from ddil_core.models.system_specs import Files
from ddil_core.support.checksums import write_manifest
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.models.test_fit import shard
from tests.pipelines import build, save_lora, without_weights

BASE = {"batch_size": 2, "pool": 6}
PD: dict[str, Any] = {"method": "pd", "stages": [{"steps": 4, "updates": 2}]}
LCM: dict[str, Any] = {"method": "lcm", "updates": 2, "teacher_steps": 20, "w_embedding": None}
DMD2: dict[str, Any] = {"method": "dmd2", "updates": 2, "teacher_steps": 4}
SD, SDXL, LCM_SD = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"
SD3, FLUX, PIXART = "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"

CASES: dict[str, tuple[str, dict[str, Any], type[DdilError], str]] = {
    "a flow by TCD": (
        SD3, LCM | {"method": "tcd"}, DdilError,
        "the teacher 'TEACHER' predicts flow, and trajectory consistency distillation needs a network that predicts ε, v "
        "or x₀; distil a flow by pd, lcm or dmd2",
    ),
    "an ε without convert": (
        PIXART, PD, DdilError,
        "the teacher 'TEACHER' predicts epsilon, and progressive distillation needs a network that predicts v: at t = "
        "999 an ε divides by α ≈ 0.07; convert it first with a section 'convert' in the protocol, or --set "
        "convert.updates=N",
    ),
    "a student": (
        LCM_SD, LCM, DdilError,
        "the teacher 'TEACHER' takes its guidance as an embedding, as LCM does, so it is a student itself; distil its "
        "own teacher",
    ),
    "FLUX.1-dev": (
        FLUX, LCM, DdilError,
        "the teacher 'TEACHER' reads its guidance scale, as a model that was distilled from a guided one does, and no "
        "method gives it a scale in training; distil another teacher",
    ),
    "a grid on a shifted schedule": (
        SD3, LCM | {"student_steps": 3}, WrongCommand,
        "on a flow the student's grid nests in the teacher's where student_steps divides teacher_steps, and 3 does not "
        "divide 20; say --set teacher_steps=21",
    ),
    "a grid on a diffusion process": (
        SD, LCM | {"teacher_steps": 30}, WrongCommand,
        "teacher_steps must divide the teacher's 1000 timesteps, and 30 does not; choose another",
    ),
    "too many steps by PD": (
        SD, PD | {"convert": {"updates": 1}, "stages": [{"steps": 500, "updates": 1}]}, WrongCommand,
        "the first stage asks the teacher 'TEACHER' for 1000 steps, and its grids have at most 999; choose fewer",
    ),
    "too many steps of a regression": (
        SD, DMD2 | {"regression": {"pairs": 1, "teacher_steps": 1000, "updates": 1}}, WrongCommand,
        "regression.teacher_steps asks the teacher 'TEACHER' for 1000 steps, and its grids have at most 999; choose "
        "fewer",
    ),
    "timesteps": (
        SD, DMD2 | {"timesteps": (1999, 999)}, WrongCommand,
        "the teacher 'TEACHER' has timesteps up to 999; choose lower timesteps and matching_range",
    ),
    "a guidance embedding for a transformer": (
        PIXART, LCM | {"w_embedding": 16}, WrongCommand,
        "the teacher 'TEACHER' has a transformer, which has no place for LCM's embedding of the guidance; say --set "
        "w_embedding=null, which builds the guidance of guidance_range into the student",
    ),
    "a LoRA that diffusers lacks": (
        PIXART, DMD2 | {"lora": {}}, WrongCommand,
        "diffusers has no LoRA for the network of 'TEACHER', PixArtTransformer2DModel; leave the LoRA out",
    ),
    "LoRA targets": (
        SDXL, DMD2 | {"lora": {"targets": ["to_q", "to_x"]}}, WrongCommand,
        "lora.targets names 'to_x', and the network of 'TEACHER' has no linear layer or convolution of this name; name "
        "the ends of layers' names, such as to_q",
    ),
    "a section student": (
        SDXL, DMD2 | {"student": {}}, WrongCommand,
        "the student of 'TEACHER' starts from its teacher's network, so that the section 'student' has no effect; leave "
        "it out, or say --set student=null",
    ),
    "a side that the autoencoder does not divide": (
        SD, LCM | {"height": 60}, WrongCommand,
        "the model 'TEACHER' cannot draw images of a height of 60: its autoencoder takes sides in multiples of 8 "
        "pixels; say 56 or 64",
    ),
    "a side that the patches do not divide": (
        SD3, LCM | {"width": 72}, WrongCommand,
        "the model 'TEACHER' cannot draw images of a width of 72: its autoencoder and its network's patches of 2 "
        "latents take sides in multiples of 16 pixels; say 64 or 80",
    ),
    "data of another size": (
        SD, LCM | {"width": 128}, WrongCommand,
        "the images of the data set 'shapes' have 64 x 64 pixels, and the teacher 'TEACHER' draws 64 x 128; choose data "
        "or a teacher of the same size",
    ),
    "TF32 on a CPU": (
        SD, LCM | {"tf32": True}, WrongCommand,
        "TF32 is arithmetic of NVIDIA's GPUs, and the device is cpu; leave out --tf32",
    ),
    "what is not refused": (
        SD, LCM, DdilError,
        "the weights TEACHER/text_encoder/model.safetensors are cut short or damaged (",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of pipelines by their layout, without weights."""

    @cache
    def make(layout: str) -> Path:
        folder = tmp_path_factory.mktemp("teacher")
        build(layout, folder / "words").save_pretrained(folder / "pipeline", safe_serialization=True)
        return without_weights(folder / "pipeline")

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_setting_is_refused_without_weights(teachers: Callable[[str], Path], case: str, tmp_path: Path) -> None:
    layout, told, kind, sentence = CASES[case]
    with pytest.raises(DdilError) as error:
        distill(str(teachers(layout)), "shapes", BASE | told, tmp_path / "run", device="cpu")
    message = str(error.value).replace(str(teachers(layout)), "TEACHER")
    assert (type(error.value), message[: len(sentence)]) == (kind, sentence)
    assert message == sentence or case == "what is not refused"
    assert not (tmp_path / "run").exists()


def test_an_optimiser_that_is_not_installed(
    teachers: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(WrongCommand, match="optimizer '8bit' needs the package bitsandbytes"):
        distill(str(teachers(SD)), "shapes", BASE | LCM | {"optimizer": "8bit"}, tmp_path / "run", device="cpu")


def test_an_adapter_for_another_base(teachers: Callable[[str], Path], tmp_path: Path) -> None:
    """The widths of SDXL's tiny U-Net and its layers' names differ from Stable Diffusion's."""
    lora = save_lora(tmp_path, build(SDXL, tmp_path / "words"))
    with pytest.raises(DdilError) as error:
        assemble("adapted", Files(teachers(SD), lora=lora))
    assert str(error.value).startswith(f"the LoRA {lora} was made for another base than 'adapted': ")
    with pytest.raises(DdilError, match="are cut short or damaged"):
        assemble("adapted", Files(teachers(SDXL), lora=lora))


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    """The weights of the other files are not read: they would not match their checksums."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    _, second = shard(broken)
    write_manifest(broken)
    content = bytearray((broken / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(DdilError, match="does not match its checksum"):
        distill(str(broken), "shapes", BASE | LCM, tmp_path / "run", device="cpu")
    second.unlink()
    with pytest.raises(DdilError) as error:
        distill(str(broken), "shapes", BASE | LCM, tmp_path / "run", device="cpu")
    assert str(error.value) == f"the weights {second} are not there; fetch or make the model again"
    assert not (tmp_path / "run").exists()
