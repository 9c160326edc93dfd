"""A distillation run: its folder, its stages one after another, its student. Interrupted anywhere, it goes on where it was."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from ddil_core.data.dataset import DataSet, open_data
from ddil_core.data.pool import LatentPool, encode_pool, picture_side
from ddil_core.denoiser import NetworkDenoiser
from ddil_core.distill import METHODS
from ddil_core.distill.capacity import require_capacity
from ddil_core.distill.config import MethodConfig
from ddil_core.distill.stage import Stage
from ddil_core.distill.student import save_student
from ddil_core.distill.watch import track, watchers
from ddil_core.errors import DdilError, WrongCommand
from ddil_core.files import write_tensors
from ddil_core.finite import broken_weight
from ddil_core.lock import held
from ddil_core.models.autoencoder import require_encoder
from ddil_core.models.model import Model, load_model
from ddil_core.parameterization import Reflection, calibrate_reflection
from ddil_core.run_folder import open_run, require_run_folder, require_same_run
from ddil_core.sampling import Bounds
from ddil_core.train import fit

PACKAGES = ("ddil", "torch", "diffusers", "transformers", "accelerate", "numpy")
C = TypeVar("C", bound=MethodConfig)


def distill(
    teacher: str,
    data: str,
    config: Any,
    out: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    download: bool = False,
) -> Path:
    """Run or finish a distillation in the folder ``out``; returns the student's folder.

    ``config`` is the configuration of one of ``METHODS``, which names it. ``download`` is the consent to fetch data on the web.

    Raises:
        WrongCommand: ``out`` holds another run, there is nothing to resume, the data cannot be trained on, or the aggregated
            dataset cannot serve a phase.
        DdilError: the teacher or a checkpoint cannot be used, the disk is full, or another command works in ``out``.
        Interrupted: a signal stopped the run; what was done is saved.
    """
    method = METHODS[config.method]
    student = out / "student"
    if not student.is_dir():
        require_capacity(config)
    accelerator = track(config, out, device)
    model = load_model(teacher, accelerator.device)
    require_teacher(model)
    method.require(model, config)
    pictures, encoded = open_data(data, download), out / "checkpoints" / "data.safetensors"
    require_batch(config, accelerator)
    with accelerator.main_process_first():  # which fetches what the others then find
        if not encoded.is_file():
            require_data(pictures, model, config.pool)
    identity = {
        "teacher": teacher,
        "teacher_sha256": model.weights_sha256(),
        "data": data,
        "config": config.model_dump(mode="json"),
    }
    if student.is_dir():
        require_same_run(out, identity, type(config))
        return student
    with ExitStack() as stack:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                require_run_folder(out, resume)
                stack.enter_context(held(out))
                open_run(out, identity, {"versions": versions(), "commit": commit()}, type(config))
        with accelerator.main_process_first():
            pool = encode_pool(model, pictures, config.pool, encoded)
        run = Run(model, pool, config, data, out, accelerator)
        found = method.train(run)
        if accelerator.is_main_process and not student.is_dir():  # another command may have ended before this one began
            save_student(model, found, Bounds.of(run.reflection, config.reflection.quantile), student)
        accelerator.wait_for_everyone()
    return student


def require_teacher(model: Model) -> None:
    """Raises DdilError: the teacher is told its guidance, as LCM is, cannot encode pictures, or draws none that are square; what
    else a method cannot distil its own ``require`` says."""
    require_encoder(model.pipeline.vae, model.reference)
    picture_side(model)
    if model.denoiser.guidance_width is not None:
        raise DdilError(
            f"the teacher {model.reference!r} is told its guidance by an embedding, as LCM is, so that it is a student itself; "
            "distil what it was distilled from"
        )


def require_data(data: DataSet, model: Model, count: int) -> None:
    """Whether ``count`` pictures of the data can be trained on, as far as is quickly seen.

    Raises:
        WrongCommand: they have another size than the model's, there are fewer, or some have no caption.
        DdilError: some are missing or damaged.
    """
    side = picture_side(model)
    if data.side not in (None, side):
        raise WrongCommand(
            f"the pictures of the data set {data.reference!r} have {data.side} x {data.side} pixels, and the teacher "
            f"{model.reference!r} was made for {side} x {side}; name data or a teacher of the other's size"
        )
    data.require(count, side)


def require_batch(config: MethodConfig, accelerator: Accelerator) -> None:
    """Raises WrongCommand: a batch does not divide into equal parts for the processes."""
    processes, parts = accelerator.num_processes, config.gradient_accumulation
    if config.batch_size % (processes * parts):
        raise WrongCommand(
            f"batch_size is the whole batch, and {config.batch_size} is not divisible by {processes} processes"
            f"{f' with {parts} parts each (gradient_accumulation)' * (parts > 1)}; choose another batch_size or number of processes"
        )


@dataclass
class Run(Generic[C]):
    """A distillation under way: what its method is given, and how a stage of it is trained."""

    model: Model
    pool: LatentPool
    config: C
    data: str
    out: Path
    accelerator: Accelerator

    @cached_property
    def reflection(self) -> Reflection:
        """Calibrated on the encoded data, on the device."""
        told = self.config.reflection
        return calibrate_reflection(self.pool.mean, told.mode, told.quantile).to(self.accelerator.device)

    def frozen(self, net: nn.Module) -> NetworkDenoiser:
        """A network as a teacher, in the teacher's dtype; the network itself keeps its own, as the start of a student.

        Raises:
            DdilError: it holds weights that are not finite.
        """
        if (broken := broken_weight(net)) is not None:
            raise DdilError(
                f"the teacher {self.model.reference!r} holds weights that are not finite, first in {broken}; fetch or make it again"
            )
        return _frozen(self.model.denoiser, net, self.config).to(self.accelerator.device)

    def trained(self, make: Callable[[], Any], net: nn.Module, name: str, title: str) -> nn.Module:
        """The network that a stage ends with, trained, or read where it is finished; ``net`` is one of its shape."""
        finished, checkpoint = (self.out / "checkpoints" / f"{name}.{kind}" for kind in ("safetensors", "pt"))
        if finished.is_file():
            net = _load_weights(copy.deepcopy(net), finished)
        else:
            stage: Stage = make()
            fit(
                stage.update,
                stage.stateful(),
                steps=stage.updates,
                checkpoint=checkpoint,
                log=self.out / "log.jsonl",
                title=title,
                save_every=self.config.save_every,
                callbacks=watchers(self, stage, name, title),
                accelerator=self.accelerator,
                check=partial(
                    stage.require_finite, f"the teacher of the stage {title!r}, from {self.model.reference!r}"
                ),
            )
            for tracker in self.accelerator.trackers if self.config.trackers else ():
                tracker.finish()
            net = stage.finish()
            del stage
            self.accelerator.free_memory()  # which else keeps every network and optimiser that it prepared
            if (broken := broken_weight(net)) is not None:
                raise DdilError(
                    f"the stage {title!r} ends with weights that are not finite, first in {broken}; its last checkpoint is kept: "
                    "start it again with a lower learning_rate or gradient_clip"
                )
            if self.accelerator.is_main_process:
                _save_weights(net, finished)
        if self.accelerator.is_main_process:
            checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return net.eval().requires_grad_(False)


def _frozen(like: NetworkDenoiser, net: nn.Module, config: MethodConfig) -> NetworkDenoiser:
    dtype, copied = getattr(torch, config.teacher_dtype), net
    if dtype != torch.float32:
        copied = copy.deepcopy(net).to(dtype)
        net.to("cpu")  # where it waits for a student to start from it
    return type(like)(copied.eval().requires_grad_(False), like.schedule, like.prediction)


def _save_weights(module: nn.Module, path: Path) -> None:
    write_tensors(path, {name: tensor.contiguous() for name, tensor in module.state_dict().items()})


def _load_weights(module: nn.Module, path: Path) -> nn.Module:
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch raise kinds of their own
        raise DdilError(f"the stage's weights {path} are damaged; delete the file to train the stage again") from error
    return module


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
