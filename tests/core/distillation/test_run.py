"""A distillation's folder: killed and resumed it is the same run; its student needs nothing of this project."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.parameterization import ReflectionMode, calibrate_reflection
from ddil_core.diffusion.schedule import transitions
from ddil_core.diffusion.solvers import ddim
from ddil_core.distillation import training
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.conversion import ConversionStage
from ddil_core.distillation.distill import distill
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.distillation.run import Run
from ddil_core.distillation.run_folder import begun_with
from ddil_core.distillation.sources import MixedSource
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import load_model
from ddil_core.models.sampling import Sampling
from ddil_core.support.environment import deterministic
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance, normal, rows
from tests.pipelines import TEACHER, save_pipeline

CONFIG = ProgressiveConfig.model_validate(
    {
        "stages": [{"steps": 4, "updates": 8}, {"steps": 2, "updates": 8}],
        "batch_size": 4,
        "pool": 12,
        "warmup": 2,
        "save_every": 2,
        "ddil": {
            "uses": 2,
            "collect_every": 3,
            "phases": [
                {"until": 0.5, "aggregated": 0.25, "p_teacher": 0.85},
                {"until": 1, "aggregated": 0.5, "p_teacher": 0.2},
            ],
        },
    }
)
UNET = "unet/diffusion_pytorch_model.safetensors"


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def go(teacher: Path, out: Path, config: ProgressiveConfig = CONFIG, **options: Any) -> Path:
    return distill(str(teacher), "shapes", config, out, device="cpu", **options)


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    go(folder, out)
    return out


def same_student(a: Path, b: Path) -> bool:
    x, y = (load_file(out / "student" / UNET) for out in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def killer(original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """``original``, and after it a kill where ``when`` says so of its arguments."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(*args, **kwargs):
            raise Killed
        return result

    return wrapped


KILLS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "while the first update": (ProgressiveStage, "update", lambda stage, step: (stage.index, step) == (0, 0)),
    "with states half used": (ProgressiveStage, "update", lambda stage, step: (stage.index, step) == (0, 4)),
    "after a collection": (MixedSource, "collect", lambda source, *args: (source.context.index, args[-1]) == (0, 6)),
    "between the stages": (training, "_save_weights", lambda unet, path: path.name == "stage-1-of-2.safetensors"),
    "in the second stage": (ProgressiveStage, "update", lambda stage, step: (stage.index, step) == (1, 5)),
    "before the student is written": (
        training,
        "_save_weights",
        lambda unet, path: path.name == "stage-2-of-2.safetensors",
    ),
}


def test_killed_again_and_again_it_ends_with_the_same_weights(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    for owner, name, when in KILLS.values():
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, killer(getattr(owner, name), when))
            with pytest.raises(Killed):
                go(folder, out, resume=(out / "run.yaml").exists())
        assert not (out / "student").exists()
    go(folder, out, resume=True)
    assert same_student(out, finished)
    assert not list(out.rglob("*.partial"))


SIGKILLED = """
import os, signal, sys
from pathlib import Path
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.conversion import ConversionStage
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.distillation.distill import distill

update = ProgressiveStage.update

def dies(stage, step):
    if (stage.index, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(stage, step)

ProgressiveStage.update = dies
distill(sys.argv[1], "shapes", ProgressiveConfig.model_validate_json(sys.argv[3]), Path(sys.argv[2]), device="cpu")
"""


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_a_process_killed_by_the_system_is_taken_up_by_another(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "sigkilled"
    done = python(SIGKILLED, folder, out, CONFIG.model_dump_json())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in (out / "checkpoints").glob("stage*")) == [
        "stage-1-of-2.safetensors",
        "stage-1-of-2.safetensors.sha256",
        "stage-2-of-2.2.pt",
        "stage-2-of-2.2.pt.sha256",
    ]
    go(folder, out, resume=True)
    assert same_student(out, finished)


ALONE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ddil_core", "ddil_eval"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Block())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
z = load_file(sys.argv[2])["z"]
options = dict(num_inference_steps=2, guidance_scale=1.0, latents=z)
latents = pipeline("a small red circle", output_type="latent", **options).images
picture = pipeline("a small red circle", output_type="np", **options).images[0]
assert picture.shape == (64, 64, 3) and 0 <= picture.min() < picture.max() <= 1
save_file({"latents": latents, "timesteps": pipeline.scheduler.timesteps}, sys.argv[3])
"""


def test_the_student_samples_in_diffusers_without_this_project(finished: Path, tmp_path: Path) -> None:
    student = load_model(str(finished))
    z = normal(1, *student.latent_shape)
    save_file({"z": z}, tmp_path / "z.safetensors")
    done = python(ALONE, finished / "student", tmp_path / "z.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert "outdated" not in done.stderr  # diffusers has nothing to say of its configuration
    found = load_file(tmp_path / "out.safetensors")
    assert found["timesteps"].tolist() == [999, 499]
    condition = student.encode(["a small red circle"])
    with torch.no_grad():
        for t, s in transitions([999, 499]):
            z, _ = ddim(
                student.denoiser.schedule, z, rows(t, z), rows(s, z), student.denoiser(z, rows(t, z), condition)
            )
    assert distance(found["latents"], z) < 1e-5


def test_the_student_is_the_average_and_another_than_its_teacher(folder: Path, finished: Path) -> None:
    student = load_file(finished / "student" / UNET)
    average = load_file(finished / "checkpoints" / "stage-2-of-2.safetensors")
    assert all(torch.equal(student[name], average[name]) for name in average)
    teacher = load_file(folder / UNET)
    assert any(not torch.equal(student[name], teacher[name]) for name in teacher)
    model = load_model(str(finished))
    bounds = model.sampling.bounds
    assert model.sampling == Sampling(solver="ddim", steps=2, guidance_scale=1.0, distilled=True, bounds=bounds)
    told = json.loads((finished / "student" / "ddil.json").read_text())
    assert (told["grid"], told["prediction"]) == ([999, 500], "v_prediction")


def test_a_student_is_sampled_with_reflection_at_its_own_bounds(finished: Path) -> None:
    """Without data, to the bit what the reflection calibrated on them does; and not at all unless it is asked for."""
    student, texts = load_model(str(finished)), ["a small red circle", "a large blue star"]
    mean = load_file(finished / "checkpoints" / "data.safetensors")["mean"].float()
    samples = [Sample(text) for text in texts]
    modes: tuple[ReflectionMode, ...] = ("none", "clamp", "fold")
    drawn = {
        mode: sample_latents(student, samples, texts, resolve_sampling(student, reflection=mode), 0) for mode in modes
    }
    assert torch.equal(drawn["none"], sample_latents(student, samples, texts, resolve_sampling(student), 0))
    for mode, found in drawn.items():
        reflection = calibrate_reflection(mean, mode, CONFIG.reflection.quantile)
        denoiser, told = student.guided(1.0, reflection), student.encode(texts)
        z = initial_noise(samples, student.latent_shape, 0)
        with torch.no_grad():
            for t, s in transitions([999, 500]):
                z, _ = ddim(denoiser.schedule, z, rows(t, z), rows(s, z), denoiser(z, rows(t, z), told))
        assert torch.equal(found, z)
        assert (float(reflection.clipped_fraction(found)) > 0) == (mode == "none")


def test_reflection_without_bounds_is_refused(folder: Path) -> None:
    with pytest.raises(WrongCommand) as error:
        resolve_sampling(load_model(str(folder)), reflection="clamp")
    assert str(error.value) == (
        f"the model '{folder}' cannot be sampled with reflection: it brings no ddil.json with the bounds of its data, "
        "as the students of 'ddil distill' do; leave reflection out"
    )


def test_the_folder_says_what_the_run_was(folder: Path, finished: Path) -> None:
    told = yaml.safe_load((finished / "run.yaml").read_text())
    assert told["teacher"] == str(folder)
    assert told["teacher_sha256"] == load_model(str(folder)).weights_sha256()
    assert ProgressiveConfig.model_validate(told["config"]) == CONFIG.with_guidance(3.0)
    assert told["config"]["guidance_scale"] == 3.0  # the teacher's own
    used = json.loads((finished / "student" / "ddil.json").read_text())["teacher"]
    assert used == {"steps": 8, "solver": "ddim", "guidance_scale": 3.0}
    assert told["versions"]["torch"] == version("torch")
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("8 → 4 steps", 8), ("4 → 2 steps", 8)]
    assert all(line["aggregated_fraction"] == 0.375 for line in lines)
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and 0 <= line["clipped_fraction"] < 1 for line in lines)


def test_a_finished_run_is_not_made_again(folder: Path, finished: Path) -> None:
    before = (finished / "student" / UNET).stat().st_mtime_ns
    assert go(folder, finished) == finished / "student"
    assert (finished / "student" / UNET).stat().st_mtime_ns == before


def refused(kind: type[DdilError], teacher: Path, out: Path, config: ProgressiveConfig = CONFIG, **options: Any) -> str:
    with pytest.raises(kind) as error:
        go(teacher, out, config, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_run_in_the_folder_is_refused(folder: Path, finished: Path) -> None:
    other = CONFIG.model_copy(update={"seed": 1})
    assert refused(WrongCommand, folder, finished, other) == (
        f"the folder {finished} holds another run (seed is 0 there); choose another --out"
    )


@pytest.mark.parametrize("recorded", ["adamw", None], ids=["plain", "older than the key"])
def test_a_run_keeps_the_optimiser_it_began_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str | None
) -> None:
    """The default was plain AdamW. The command that began such a run finishes it as it would have ended then."""
    short = CONFIG.model_dump(exclude_unset=True) | {"stages": [{"steps": 4, "updates": 4}]}
    now, plain = (ProgressiveConfig.model_validate(short | more) for more in ({}, {"optimizer": "adamw"}))
    assert now.optimizer == "fused"
    go(folder, tmp_path / "whole", plain)
    out = tmp_path / "old"
    with monkeypatch.context() as patched:
        patched.setattr(ProgressiveStage, "update", killer(ProgressiveStage.update, lambda stage, step: step == 2))
        with pytest.raises(Killed):
            go(folder, out, plain)
    told = yaml.safe_load((out / "run.yaml").read_text())
    del told["config"]["optimizer"]
    if recorded is not None:
        told["config"]["optimizer"] = recorded
    (out / "run.yaml").write_text(yaml.safe_dump(told))
    go(folder, out, now)
    assert same_student(out, tmp_path / "whole")
    assert begun_with(out, now).optimizer == "adamw" and begun_with(tmp_path / "new", now) is now
    fused = ProgressiveConfig.model_validate(short | {"optimizer": "fused"})
    assert refused(WrongCommand, folder, out, fused) == (
        f"the folder {out} holds another run (optimizer is 'adamw' there); choose another --out"
    )


def test_a_folder_with_other_files_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert refused(WrongCommand, folder, tmp_path) == (
        f"the folder {tmp_path} is not empty and holds no run; choose another --out"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_nothing_to_resume_is_refused(folder: Path, tmp_path: Path) -> None:
    assert refused(WrongCommand, folder, tmp_path / "none", resume=True) == (
        f"there is no run to resume in {tmp_path / 'none'}: it has no run.yaml"
    )
    assert not (tmp_path / "none").exists()


def test_damaged_files_of_a_run_are_one_sentence_each(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("student"))
    weights = out / "checkpoints" / "stage-1-of-2.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert refused(DdilError, folder, out) == (
        f"the file of the stage's weights {weights} does not match its checksum stage-1-of-2.safetensors.sha256, so "
        "one of the two was damaged or changed after it was written; delete it to train the stage again"
    )
    weights.unlink()
    checkpoint = weights.with_suffix(".pt")
    checkpoint.write_bytes(b"not a checkpoint")
    message = refused(DdilError, folder, out)
    assert message.startswith(f"the checkpoint {checkpoint} cannot be read (")
    assert message.endswith("); delete it to start this stage again")
    data = out / "checkpoints" / "data.safetensors"
    data.write_bytes(data.read_bytes()[:500])
    assert refused(DdilError, folder, out) == (
        f"the file of the encoded data {data} does not match its checksum data.safetensors.sha256, so one of the two "
        "was damaged or changed after it was written; delete the file to encode the data again"
    )
    (out / "run.yaml").write_text("teacher: [")
    assert str(out / "run.yaml") in refused(DdilError, folder, out)


def test_a_teacher_that_predicts_eps_is_refused_without_a_conversion(tmp_path: Path) -> None:
    other = save_pipeline(tmp_path, TEACHER, seed=1, prediction="epsilon")
    message = refused(DdilError, other, tmp_path / "out")
    assert message == (
        f"the teacher '{other}' predicts epsilon, and progressive distillation needs a network that predicts v: at t "
        "= 999 an ε divides by α ≈ 0.07; convert it first with a section 'convert' in the protocol, or --set "
        "convert.updates=N"
    )
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_trained_on_are_refused_before_a_folder_is_made(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    for data, sentence in (
        ("shaeps", "is not known"),
        (f"folder:{tmp_path / 'pictures'}", "fewer than the pool of 12"),
    ):
        with pytest.raises(WrongCommand, match=sentence):
            distill(str(folder), data, CONFIG, out, device="cpu")
        assert not out.exists()


def test_a_teacher_of_another_size_than_its_pictures_is_refused(folder: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    config = teacher / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    assert refused(WrongCommand, teacher, tmp_path / "out") == (
        f"the images of the data set 'shapes' have 64 x 64 pixels, and the teacher '{teacher}' draws 128 x 128; "
        "choose data or a teacher of the same size"
    )
    assert not (tmp_path / "out").exists()


def test_an_lcm_is_refused_as_a_teacher(tmp_path: Path) -> None:
    told = save_pipeline(tmp_path, None, seed=1, layout="LatentConsistencyModelPipeline")
    assert refused(DdilError, told, tmp_path / "out").endswith(
        "takes its guidance as an embedding, as LCM does, so it is a student itself; distil its own teacher"
    )


@pytest.mark.usefixtures("a_gpu")
def test_the_own_weights_of_a_rounded_teacher_leave_the_gpu(folder: Path, tmp_path: Path) -> None:
    """And are frozen again from there, where a stage is finished already."""
    config = ProgressiveConfig.model_validate(CONFIG.model_dump() | {"teacher_dtype": "bfloat16"})
    model, accelerator = load_model(str(folder), "cuda"), SimpleNamespace(device=torch.device("cuda"))
    pool: Any = None
    begun = Run(model, pool, config, "shapes", tmp_path, accelerator)  # type: ignore[arg-type]
    for _ in range(2):
        frozen = begun.frozen(model.denoiser.net)
        assert {(p.device.type, p.dtype) for p in frozen.parameters()} == {("cuda", torch.bfloat16)}
        assert {(p.device.type, p.dtype) for p in model.denoiser.net.parameters()} == {("cpu", torch.float32)}


@pytest.mark.gpu
def test_a_deterministic_run_gives_the_same_bits_on_a_gpu(folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    with deterministic():
        for out in outs:
            distill(str(folder), "shapes", CONFIG, out, device="cuda")
    assert same_student(*outs)


def test_a_conversion_that_is_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = save_pipeline(tmp_path / "teacher", TEACHER, seed=1, prediction="epsilon")
    told = {"convert": {"updates": 5}, "stages": [{"steps": 4, "updates": 1}], "ddil": None}
    config = ProgressiveConfig.model_validate(CONFIG.model_dump() | told)
    go(teacher, tmp_path / "whole", config)
    with monkeypatch.context() as patched:
        patched.setattr(ConversionStage, "update", killer(ConversionStage.update, lambda stage, step: step == 3))
        with pytest.raises(Killed):
            go(teacher, tmp_path / "killed", config)
    assert (tmp_path / "killed" / "checkpoints" / "convert.2.pt").is_file()
    go(teacher, tmp_path / "killed", config, resume=True)
    assert same_student(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("layout", "dtypes"),
    [
        ("StableDiffusionPipeline", ("bfloat16", "float32")),
        ("StableDiffusionXLPipeline", ("bfloat16", "bfloat16")),
    ],
)
def test_an_eps_teacher_of_any_layout_gives_a_v_student(layout: str, dtypes: tuple[str, str], tmp_path: Path) -> None:
    """ε → v, then 8 → 4 → 2, killed once in between;

    the student is a float32 pipeline that stock diffusers samples.
    """
    teacher = save_pipeline(tmp_path / "teacher", TEACHER, seed=1, layout=layout, prediction="epsilon")
    config = ProgressiveConfig.model_validate(
        CONFIG.model_dump() | {"convert": {"updates": 4}, "teacher_dtype": dtypes[0], "student_dtype": dtypes[1]}
    )
    out = tmp_path / "out"
    update = ProgressiveStage.update
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ProgressiveStage, "update", killer(update, lambda stage, step: (stage.index, step) == (0, 4)))
        with pytest.raises(Killed):
            go(teacher, out, config)
    go(teacher, out, config, resume=True)
    stages = [json.loads(line)["stage"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert stages == ["ε → v", "8 → 4 steps", "4 → 2 steps"]
    student = load_model(str(out))
    assert (student.denoiser.prediction, student.sampling.steps) == ("v_prediction", 2)
    assert {p.dtype for p in student.denoiser.net.parameters()} == {torch.float32}
    frame = load_model(str(teacher)).pipeline
    for part in ("text_encoder", "text_encoder_2", "vae"):
        if getattr(frame, part, None) is not None:
            theirs = getattr(student.pipeline, part).state_dict()
            assert all(torch.equal(value, theirs[name]) for name, value in getattr(frame, part).state_dict().items())
    stock = DiffusionPipeline.from_pretrained(out / "student")
    assert stock.scheduler.config.prediction_type == "v_prediction"
    stock.set_progress_bar_config(disable=True)
    z = normal(1, *student.latent_shape)
    done = stock("a small red circle", num_inference_steps=2, guidance_scale=1.0, latents=z, output_type="latent")
    denoiser, condition = student.guided(), student.encode(["a small red circle"])
    with torch.no_grad():
        for t, s in transitions([999, 499]):
            z, _ = ddim(denoiser.schedule, z, rows(t, z), rows(s, z), denoiser(z, rows(t, z), condition))
    assert distance(done.images, z) < 1e-5
