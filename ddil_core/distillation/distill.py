"""Run a distillation from a teacher and data to a saved student. Interrupted anywhere, the run goes on where it was."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ddil_core.data.base import DataSet
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import encode_pool, image_side
from ddil_core.distillation.checks import require_capacity
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.run import Run
from ddil_core.distillation.run_folder import open_run, require_run_folder, require_same_run
from ddil_core.distillation.student import save_student
from ddil_core.distillation.watch import track
from ddil_core.models.autoencoder import require_encoder
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import Bounds
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.lock import held
from ddil_core.support.provenance import commit, versions


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
    image_side(model)
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
    side = image_side(model)
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
