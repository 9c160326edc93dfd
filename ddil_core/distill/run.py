"""A distillation run: its folder, its stages one after another, its student. Interrupted anywhere, it goes on where it was."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from ddil_core.data import LatentPool, encode_pool, open_data
from ddil_core.denoiser import GuidedDenoiser, NetworkDenoiser
from ddil_core.distill.config import DistillConfig
from ddil_core.distill.conversion import ConversionStage
from ddil_core.distill.progressive import ProgressiveStage
from ddil_core.errors import DdilError, WrongCommand
from ddil_core.models import Model, load_model
from ddil_core.parameterization import calibrate_reflection
from ddil_core.protocol import read_yaml
from ddil_core.sampling import SYSTEM_FILE, Sampling
from ddil_core.schedule import grid
from ddil_core.train import fit

PACKAGES = ("ddil", "torch", "diffusers", "transformers", "accelerate", "numpy")


def distill(
    teacher: str, data: str, config: DistillConfig, out: Path, *, resume: bool = False, device: str | None = None
) -> Path:
    """Run or finish a distillation in the folder ``out``; returns the student's folder.

    Raises:
        WrongCommand: ``out`` holds another run, or there is nothing to resume.
        DdilError: the teacher or a checkpoint cannot be used.
    """
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=config.mixed_precision)
    model = load_model(teacher, accelerator.device)
    require_convertible(model, config)
    open_run(
        out,
        {
            "teacher": teacher,
            "teacher_sha256": model.weights_sha256(),
            "data": data,
            "config": config.model_dump(mode="json"),
        },
        resume,
    )
    student = out / "student"
    if not student.is_dir():
        pool = encode_pool(model, open_data(data), config.pool, out / "checkpoints" / "data.safetensors")
        if model.denoiser.prediction != "v_prediction":
            model = convert(model, pool, config, out, accelerator)
        net = run_stages(model, pool, config, out, accelerator)
        save_student(model, net, config.stages[-1].steps, student)
    return student


def require_convertible(model: Model, config: DistillConfig) -> None:
    """A few-step student predicts v, and so its teacher must, or be made to.

    Raises:
        DdilError: the teacher predicts ε and the protocol has no conversion for it, it predicts something else, or it is an LCM.
    """
    prediction = model.denoiser.prediction
    if model.denoiser.guidance_width is not None:
        raise DdilError(
            f"the teacher {model.reference!r} is told its guidance by an embedding, as LCM is, so that it is a student itself; "
            "distil what it was distilled from"
        )
    if prediction == "v_prediction" or (prediction == "epsilon" and config.convert is not None):
        return
    why = f"the teacher {model.reference!r} predicts {prediction}, and progressive distillation needs a network that predicts v"
    if prediction == "epsilon":
        raise DdilError(
            f"{why}: at t = 999 an ε divides by α ≈ 0.07; convert it first with a section 'convert' in the protocol, or "
            "--set convert.updates=N"
        )
    raise DdilError(f"{why} or ε; distil another teacher")


def convert(model: Model, pool: LatentPool, config: DistillConfig, out: Path, accelerator: Accelerator) -> Model:
    """The teacher as a model that predicts v; its weights stay in ``checkpoints/convert.safetensors``."""
    assert config.convert is not None
    teacher = GuidedDenoiser(_frozen(model.denoiser, model.denoiser.net, config))
    told = model.nothing(), pool, config.convert, config, accelerator
    make = partial(ConversionStage, teacher, *told, start=model.denoiser.net)
    net = _trained(make, model.denoiser.net, out, "convert", "ε → v", config)
    denoiser = type(model.denoiser)(net, model.denoiser.schedule, "v_prediction")
    return replace(model, denoiser=denoiser)


def run_stages(model: Model, pool: LatentPool, config: DistillConfig, out: Path, accelerator: Accelerator) -> nn.Module:
    """The stages in turn; each finished one leaves ``checkpoints/stage-I-of-N.safetensors``, which is not made again."""
    latents = pool.mean.float()
    reflection = calibrate_reflection(latents, config.reflection.mode, config.reflection.quantile).to(
        accelerator.device
    )
    guided = model.guided(config.guidance_scale, reflection)
    net: nn.Module = model.denoiser.net
    for index, stage in enumerate(config.stages):
        frozen = _frozen(model.denoiser, net, config)
        teacher = GuidedDenoiser(frozen, reflection=reflection)
        if index == 0:
            teacher = GuidedDenoiser(frozen, guided.unconditional, guided.guidance_scale, reflection)
        make = partial(ProgressiveStage, teacher, pool, stage, config, accelerator, index, net)
        name = f"stage-{index + 1}-of-{len(config.stages)}"
        net = _trained(make, net, out, name, f"{2 * stage.steps} → {stage.steps} steps", config)
    return net


def _frozen(like: NetworkDenoiser, net: nn.Module, config: DistillConfig) -> NetworkDenoiser:
    """A network as a teacher, in the teacher's dtype; the network itself keeps its own, as the start of a student."""
    dtype = getattr(torch, config.teacher_dtype)
    copied = net if dtype == torch.float32 else copy.deepcopy(net).to(dtype)
    return type(like)(copied.eval().requires_grad_(False), like.schedule, like.prediction)


def _trained(
    make: Callable[[], ConversionStage | ProgressiveStage],
    net: nn.Module,
    out: Path,
    name: str,
    title: str,
    config: DistillConfig,
) -> nn.Module:
    """The network that a stage ends with, trained, or read where it is finished; ``net`` is one of its shape."""
    finished, checkpoint = (out / "checkpoints" / f"{name}.{kind}" for kind in ("safetensors", "pt"))
    if finished.is_file():
        net = _load_weights(copy.deepcopy(net), finished)
    else:
        trainer = make()
        fit(
            trainer.update,
            trainer.stateful(),
            steps=trainer.updates,
            checkpoint=checkpoint,
            log=out / "log.jsonl",
            title=title,
            save_every=config.save_every,
        )
        net = trainer.finish()
        _save_weights(net, finished)
        checkpoint.unlink()
    return net.eval().requires_grad_(False)


def _save_weights(module: nn.Module, path: Path) -> None:
    temporary = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, temporary)
    temporary.replace(path)


def _load_weights(module: nn.Module, path: Path) -> nn.Module:
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch raise kinds of their own
        raise DdilError(f"the stage's weights {path} are damaged; delete the file to train the stage again") from error
    return module


def save_student(model: Model, net: nn.Module, steps: int, folder: Path) -> None:
    """Write the student as a pipeline that diffusers loads without this project, under its final name only when whole.

    Its scheduler spaces stock DDIM ``trailing`` (999, 749, 499, 249 at four steps, the nearest that diffusers has to the grid
    trained on); the file ``ddil.json`` beside it names the exact sampling.
    """
    from diffusers import DDIMScheduler

    pipeline = copy.copy(model.pipeline)
    scheduler = DDIMScheduler.from_config(
        model.pipeline.scheduler.config,
        prediction_type=model.denoiser.prediction,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,  # of no effect here; diffusers warns of any other value
    )
    temporary = folder.with_name(folder.name + ".partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    pipeline.register_modules(**{model.layout.network: net, "scheduler": scheduler})
    pipeline.save_pretrained(temporary, safe_serialization=True)
    sampling = Sampling(solver="ddim", steps=steps, guidance_scale=1.0, distilled=True)
    told = {**vars(sampling), "prediction": model.denoiser.prediction, "grid": grid(steps)}
    (temporary / SYSTEM_FILE).write_text(json.dumps(told, indent=2) + "\n")
    temporary.replace(folder)


def open_run(out: Path, identity: dict[str, Any], resume: bool) -> None:
    """Begin a run in ``out`` or take one up again; ``run.yaml`` says what it is.

    Raises:
        WrongCommand: ``out`` holds another run or other files, or ``resume`` was asked for and there is no run.
    """
    path = out / "run.yaml"
    if path.is_file():
        held = read_yaml(path)
        different = sorted(key for key in identity if held.get(key) != identity[key])
        if different:
            raise WrongCommand(
                f"the folder {out} holds another run (its {', '.join(different)} differ); choose another --out"
            )
        return
    if resume:
        raise WrongCommand(f"there is no run to resume in {out}: it has no run.yaml")
    if out.exists() and any(out.iterdir()):
        raise WrongCommand(f"the folder {out} is not empty and holds no run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    provenance = {
        "versions": versions(),
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    temporary = path.with_suffix(".partial")
    temporary.write_text(yaml.safe_dump(identity | provenance, sort_keys=False, allow_unicode=True))
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
