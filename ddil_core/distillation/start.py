"""The network that a student starts from: its teacher's, or, where the teacher is a formula, one fitted to it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ddil_core.diffusion.denoiser import ClosedForm, GuidedDenoiser
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.conversion import ConversionStage
from ddil_core.distillation.dropout import seeded
from ddil_core.distillation.run import Run
from ddil_core.distillation.training import train_stage
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand


def require_start(model: Model, config: MethodConfig) -> None:
    """Refuse a section ``student`` that the teacher has no use for, and a formula without one.

    Raises:
        WrongCommand: the configuration is one of these.
    """
    exact = isinstance(model.denoiser.net, ClosedForm)
    if exact and config.student is None:
        raise WrongCommand(
            f"the teacher {model.reference!r} is a formula without weights, so that its student needs a network of its "
            "own; say --set student.width=128"
        )
    if not exact and config.student is not None:
        raise WrongCommand(
            f"the student of {model.reference!r} starts from its teacher's network, so that the section 'student' has "
            "no effect; leave it out, or say --set student=null"
        )


def starting_network(run: Run[Any]) -> nn.Module:
    """Return the network that the student starts from.

    It is the teacher's network. A teacher that is a formula has none: then it is a new network of the size in
    ``student``, which first learns the formula's output at forward-diffused data, without guidance. Its weights stay in
    ``checkpoints/fit.safetensors``.
    """
    teacher, student = run.model.denoiser.net, run.config.student
    if not isinstance(teacher, ClosedForm):
        return teacher
    with seeded(torch.device("cpu"), run.config.seed, "student"):
        fresh = teacher.student(student.width, student.depth)
    exact = GuidedDenoiser(run.frozen(teacher))
    make = partial(
        ConversionStage, exact, run.model.nothing(), run.pool, student, run.config, run.accelerator, fresh, "fit"
    )
    return train_stage(run, make, fresh, "fit", "fit to the formula")
