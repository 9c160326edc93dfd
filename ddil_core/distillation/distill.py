"""Distillation of a few-step student from a teacher and data. An interrupted run goes on where it stopped."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ddil_core.data.base import DataSet
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.data.stream import open_stream
from ddil_core.distillation.checks import (
    pool_size,
    require_batch,
    require_capacity,
    require_data,
    require_teacher,
    stream_size,
)
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.methods import METHODS, read_config
from ddil_core.distillation.optimizer import require_optimizer
from ddil_core.distillation.processes import make_accelerator
from ddil_core.distillation.run import Run
from ddil_core.distillation.run_folder import begun_with, open_run, require_run_folder, require_same_run
from ddil_core.distillation.start import require_start
from ddil_core.distillation.student import save_student
from ddil_core.models.compiling import require_compiler
from ddil_core.models.model import Model, outline, with_weights
from ddil_core.models.references import resolve
from ddil_core.models.sampling import Bounds, sampling_line
from ddil_core.support import ranks
from ddil_core.support.checksums import require_checksum
from ddil_core.support.compute import Compute
from ddil_core.support.environment import is_deterministic
from ddil_core.support.lock import held
from ddil_core.support.progress import note
from ddil_core.support.provenance import commit, versions


def distill(
    teacher: str,
    data: str,
    config: MethodConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    download: bool = False,
) -> Path:
    """Distil a student, or finish the distillation in the folder ``out``.

    ``distill("shapes", "shapes", "pd", "runs/pd")`` distils the shipped teacher by progressive distillation with DDIL.

    Args:
        teacher: The reference of the teacher: a name, a folder or a hub id.
        data: The reference of the data set.
        config: A configuration, its content, the path of a protocol, or the name of a method. A name stands for the
            method's shipped protocol: of the paper for a teacher of Stable Diffusion's size or more, of the shapes
            world for any other. A line says which.
        out: The run folder. The same call again goes on with the run in it.
        resume: Refuse to begin a new run.
        device: "cpu" or "cuda"; None for the accelerator that is there.
        download: Consent to fetch training data from the web.

    Returns:
        The folder of the student, a pipeline that diffusers loads. ``load_model`` takes this folder or ``out``.

    Raises:
        WrongCommand: the configuration does not fit, ``out`` holds another run, there is nothing to resume, the data
            cannot be trained on, or the aggregated dataset is too small for a phase.
        DdilError: the teacher or a checkpoint cannot be used, the disk is full, or another command works in ``out``.
        Interrupted: a signal stopped the run. Its checkpoint is saved.
    """
    out = Path(out)
    config = begun_with(out, read_config(config, teacher))
    student_folder, encoded = out / "student", out / "checkpoints" / "data.safetensors"
    if not (finished := student_folder.is_dir()):
        require_capacity(config)
    accelerator = make_accelerator(config, out, device)
    if not finished:
        _require_setting(config, accelerator)
    model, images = outline_teacher(teacher, config), open_data(data, download)
    size = pool_size(config.pool, images)
    with accelerator.main_process_first():  # the main process fetches files that the others then find
        if not encoded.is_file():
            require_data(images, model, size if config.stream is None else stream_size(size, images))
    config, own_guidance = _with_guidance(config, model), model.sampling.guidance_scale
    if not finished:
        model = with_weights(model, accelerator.device, Compute(tf32=config.tf32))
    identity = _identity(teacher, model, data, config.model_copy(update={"pool": size}))
    if finished:
        require_same_run(out, identity, type(config), own_guidance)
        require_checksum(student_folder, "the student", "delete its folder, and run the same command to write it again")
        return student_folder
    note(sampling_line(f"{teacher}, the teacher", config.teacher_use()))
    with frozen_heap(), ranks.others_named(), _holding(out, accelerator, resume, identity, config, own_guidance):
        pool = _encoded(model, images, size, encoded, config)
        _train(Run(model, pool, config, data, out, accelerator), student_folder)
    return student_folder


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Keep what exists now out of Python's searches for garbage inside the context.

    A finished stage frees its networks by a search. It takes a third of a second in all modules that are loaded.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _train(run: Run[MethodConfig], student_folder: Path) -> None:
    """Train the student and save it."""
    config, accelerator, teacher = run.config, run.accelerator, run.model  # a method may replace the run's model
    student = run.train(METHODS[config.method].train)
    if accelerator.is_main_process and not student_folder.is_dir():  # another command may have written it meanwhile
        bounds = Bounds.of(run.reflection, config.reflection.quantile)
        save_student(teacher, student, bounds, student_folder, config.teacher_use())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(run.out / "checkpoints" / "stream", ignore_errors=True)


def _encoded(model: Model, images: DataSet, size: int, path: Path, config: MethodConfig) -> LatentPool:
    """Encode the pool, and open the stream that follows it where the configuration has one."""
    pool = encode_pool(model, images, size, path)
    if config.stream is not None:
        pool = open_stream(model, images, pool, path.with_name("stream"), config.stream * config.batch_size)
    if config.offload:
        model.pipeline.vae.to("cpu")
    return pool


def _require_setting(config: MethodConfig, accelerator: Accelerator) -> None:
    """Refuse what the processes, the packages or the device cannot do.

    Raises:
        WrongCommand: the processes do not divide the batch, the optimiser is not installed, or TF32 is for a GPU.
        DdilError: nothing can be compiled here.
    """
    require_batch(config, accelerator)
    require_optimizer(config)
    config.compute.require_device(accelerator.device)
    if config.compile:
        require_compiler(accelerator.device.type)


def outline_teacher(teacher: str, config: MethodConfig) -> Model:
    """Return the teacher without its weights. What it cannot be distilled by is refused here, before they are loaded.

    Raises:
        WrongCommand: the section ``student`` does not fit the teacher.
        DdilError: the method cannot distil this teacher.
    """
    model = outline(teacher, resolve(teacher), **config.size)
    require_teacher(model)
    require_start(model, config)
    METHODS[config.method].require(model, config)
    model.denoiser.schedule = model.denoiser.schedule.with_exact_times()  # as the schedulers of students give them
    return model


def _with_guidance(config: MethodConfig, model: Model) -> MethodConfig:
    """Put the teacher's own guidance scale into a configuration that has none."""
    unset = getattr(config, "guidance_scale", 1.0) is None
    return config.with_guidance(model.own_guidance()) if unset else config


def _identity(teacher: str, model: Model, data: str, config: MethodConfig) -> dict[str, Any]:
    """Return all that the student depends on."""
    weights = model.weights_sha256()
    return {"teacher": teacher, "teacher_sha256": weights, "data": data, "config": config.model_dump(mode="json")}


@contextmanager
def _holding(
    out: Path, accelerator: Accelerator, resume: bool, identity: dict[str, Any], config: MethodConfig, own: float
) -> Iterator[None]:
    """Begin the run in its folder or go on with it, and keep other commands out of the folder.

    ``own`` is the teacher's own guidance scale.
    """
    with ExitStack() as stack:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                require_run_folder(out, resume)
                stack.enter_context(held(out))
                origin = {"versions": versions(), "commit": commit(), "deterministic": is_deterministic()}
                open_run(out, identity, origin, type(config), own)
        yield
