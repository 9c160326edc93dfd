"""Checks before a run begins: they refuse what cannot be trained, before anything is computed or written."""

from __future__ import annotations

import math
from bisect import bisect_left

from accelerate import Accelerator

from ddil_core.data.base import DataSet
from ddil_core.data.folder import ImageFiles
from ddil_core.data.pool import image_side
from ddil_core.diffusion.schedule import FlowSchedule
from ddil_core.distillation.config import Collection, MethodConfig
from ddil_core.distillation.phases import DdilConfig, PhaseConfig, curve_bounds
from ddil_core.models.autoencoder import require_encoder
from ddil_core.models.model import Model
from ddil_core.support.errors import DdilError, WrongCommand


def require_teacher(model: Model) -> None:
    """Refuse a teacher that no method can distil. Each method's own ``require`` refuses more.

    Raises:
        DdilError: the teacher cannot encode images, or reads its guidance scale.
    """
    require_encoder(model.pipeline.vae, model.reference)
    if model.denoiser.guidance_width is not None:
        raise DdilError(
            f"the teacher {model.reference!r} takes its guidance as an embedding, as LCM does, so it is a student "
            "itself; distil its own teacher"
        )
    if model.denoiser.reads_end:
        raise DdilError(
            f"the teacher {model.reference!r} is told where its jumps end, as CTM's students are, so it is a student "
            "itself; distil its own teacher"
        )
    if model.denoiser.reads_guidance:
        raise DdilError(
            f"the teacher {model.reference!r} reads its guidance scale, as a model that was distilled from a guided "
            "one does, and no method gives it a scale in training; distil another teacher"
        )


def require_few_step(model: Model, method: str) -> None:
    """Refuse InstaFlow's velocity, for which diffusers has no scheduler that a student could be saved with.

    ``method`` is what the message calls the method.

    Raises:
        DdilError: the teacher predicts it.
    """
    if model.denoiser.prediction == "rectified_flow":
        raise DdilError(
            f"the teacher {model.reference!r} predicts {model.denoiser.prediction}, and {method} needs a network that "
            "predicts ε, v, x₀ or a flow's ε − x₀; distil another teacher"
        )


def require_steps(model: Model, steps: int, setting: str) -> None:
    """Refuse a grid of more steps than a teacher on a diffusion process has. A flow has any grid.

    ``setting`` is what the message calls the setting that asks for ``steps``.

    Raises:
        WrongCommand: the teacher has no such grid.
    """
    most = len(model.denoiser.schedule) - 1
    if steps > most and not isinstance(model.denoiser.schedule, FlowSchedule):
        raise WrongCommand(
            f"{setting} asks the teacher {model.reference!r} for {steps} steps, and its grids have at most {most}; "
            "choose fewer"
        )


def pool_size(pool: int | str, data: DataSet) -> int:
    """Return the number of training images; ``all`` is the number that a folder or COCO has.

    Raises:
        WrongCommand: ``pool`` is ``all``, and the data set does not say how many images it has.
    """
    if isinstance(pool, int):
        return pool
    if isinstance(data, ImageFiles):
        return len(data.training_files())
    raise WrongCommand(
        f"pool: all takes all images of a folder or of COCO, and {data.reference!r} does not say how many it has; give "
        "a number, as in --set pool=16384"
    )


def stream_size(size: int, data: DataSet) -> int:
    """Return how many images of a stream are checked before training: all of a folder, else the first window's."""
    return len(data.training_files()) if isinstance(data, ImageFiles) else size


def require_data(data: DataSet, model: Model, count: int) -> None:
    """Refuse data where a quick look at ``count`` images shows that they cannot be trained on.

    Raises:
        WrongCommand: the images have another size than the model's, there are too few, or some have no caption.
        DdilError: some images are missing or damaged.
    """
    side, (height, width) = image_side(model), model.image_size
    if data.side not in (None, side):
        raise WrongCommand(
            f"the images of the data set {data.reference!r} have {data.side} x {data.side} pixels, and the teacher "
            f"{model.reference!r} draws {height} x {width}; choose data or a teacher of the same size"
        )
    data.require(count, side)


def require_batch(config: MethodConfig, accelerator: Accelerator) -> None:
    """Refuse a batch that the processes cannot divide into equal parts.

    Raises:
        WrongCommand: they cannot.
    """
    require_divided(config, accelerator.num_processes)


def require_divided(config: MethodConfig, processes: int) -> None:
    """Refuse a batch that ``processes`` cannot divide. See ``require_batch``."""
    parts = config.gradient_accumulation
    if config.batch_size % (processes * parts):
        raise WrongCommand(
            f"batch_size is the whole batch, and {config.batch_size} is not divisible by {processes} processes"
            f"{f' with {parts} parts each (gradient_accumulation)' * (parts > 1)}; choose another batch_size or "
            "number of processes"
        )


def require_capacity(config: MethodConfig) -> None:
    """Refuse an aggregated dataset that is too small for a phase of the run.

    A collection gives the states that the coming updates use. They must fit beside the states that are still to be
    used.

    Raises:
        WrongCommand: ``ddil.capacity`` is too small; the message names settings that work.
    """
    ddil = config.ddil
    if ddil is None:
        return
    needs = {stage.title: most_states(ddil, stage, config.batch_size) for stage in config.collections()}
    worst = max(needs, key=lambda title: needs[title], default=None)
    if worst is None or needs[worst] <= ddil.capacity:
        return
    fewer = _collect_every(config, ddil)
    other = "" if fewer is None else f", or --set ddil.collect_every={fewer}"
    raise WrongCommand(
        f"the aggregated dataset is too small for the stage {worst!r}: with batch_size {config.batch_size} and "
        f"ddil.collect_every {ddil.collect_every} it may hold {needs[worst]:,} states, and ddil.capacity is "
        f"{ddil.capacity:,}; say --set ddil.capacity={needs[worst]}{other}"
    )


def most_states(ddil: DdilConfig, stage: Collection, batch_size: int) -> int:
    """Return an upper bound of the number of states that the dataset holds at once in a stage."""
    most, first = 0, 0
    for phase in ddil.phases:
        end = round(phase.until * stage.draws)
        updates = min(ddil.collect_every, end - first)
        largest = curve_bounds(phase.aggregated)[1]
        count = math.ceil(round(largest * batch_size, 6))  # the most of a batch; 0.1 · 30 is above 3
        if updates > 0 and count > 0:
            # Before a collection fewer uses are pending than a batch takes. Each may be of another state. With
            # ``period`` more pending uses there are at least as many states, so that the largest numbers decide.
            period = ddil.uses * max(stage.lengths)
            pending = range(max(0, count - period), count)
            most = max(most, *(held + collected(updates * count - held, ddil.uses, stage, phase) for held in pending))
        first = end
    return most


def collected(wanted: int, uses: int, stage: Collection, phase: PhaseConfig) -> int:
    """Return the most states that a collection adds for ``wanted`` uses. It adds whole trajectories."""
    states = math.ceil(wanted / uses)
    if len(stage.lengths) == 1:
        return math.ceil(states / stage.lengths[0]) * stage.lengths[0]
    least, most = curve_bounds(phase.p_teacher)
    shares = zip(stage.lengths, (most, 1 - least), strict=True)
    return states + sum(length for length, share in shares if share > 0) - 1


def _collect_every(config: MethodConfig, ddil: DdilConfig) -> int | None:
    """Return the most updates between collections for which the capacity suffices; None where it never does."""

    def too_much(every: int) -> bool:
        fewer = ddil.model_copy(update={"collect_every": every})
        return any(most_states(fewer, stage, config.batch_size) > ddil.capacity for stage in config.collections())

    return bisect_left(range(1, ddil.collect_every), True, key=too_much) or None
