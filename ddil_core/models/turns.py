"""Two models that take turns in a rollout, and what they must share."""

from __future__ import annotations

import torch
from torch import nn

from ddil_core.diffusion.rollout import (
    Actor,
    pair_actors,
)
from ddil_core.diffusion.schedule import Time
from ddil_core.diffusion.solvers import get_solver
from ddil_core.models.autoencoder import SCALING
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from ddil_core.support.progress import warn


def take_turns(
    teacher: Model, student: Model, teacher_steps: int = 32, guidance_scale: float | None = None
) -> tuple[dict[str, Actor], list[Time]]:
    """Teacher and student as the actors of a rollout, and the grid on which they meet.

    A student that was made for a number of steps takes that many at its own guidance, another one 4 without guidance.

    Raises:
        WrongCommand: the grids do not nest, or the two differ in what they share in a rollout: the layout, the noise schedule, the
            text encoders, the autoencoder.
    """
    different = differences(teacher, student)
    if different:
        raise WrongCommand(
            f"{student.reference!r} has another {' and another '.join(different)} than {teacher.reference!r}, so that the two "
            "cannot take turns; take a student that was distilled from this teacher"
        )
    made_for, schedule = student.sampling, teacher.denoiser.schedule
    if made_for.distilled and get_solver(made_for.solver).stochastic:
        warn(f"{student.reference!r} was made for the solver {made_for.solver!r}; here it takes deterministic steps")
    student_grid = schedule.grid(made_for.steps if made_for.distilled and made_for.steps else 4)
    guided = teacher.guided(guidance_scale), student.guided(None if made_for.distilled else 1.0)
    return pair_actors(*guided, schedule.grid(teacher_steps), student_grid), student_grid


def differences(teacher: Model, student: Model) -> list[str]:
    """What two models that take turns would have to share, and do not."""
    if teacher.layout.encode is not student.layout.encode:
        return ["layout"]
    found = []
    a, b = teacher.denoiser.schedule, student.denoiser.schedule
    if type(a) is not type(b) or not torch.equal(a.alphas, b.alphas) or a.grid(4) != b.grid(4):
        found.append("noise schedule")
    shared = ("text_encoder", "text_encoder_2", "text_encoder_3"), ("vae",)
    for parts, title in zip(shared, ("text encoder", "autoencoder"), strict=True):
        if not all(
            _same_weights(*(getattr(model.pipeline, part, None) for model in (teacher, student))) for part in parts
        ):
            found.append(title)
    scalings = [[model.pipeline.vae.config.get(key) for key in SCALING] for model in (teacher, student)]
    if "autoencoder" not in found and scalings[0] != scalings[1]:
        found.append("scaling of the autoencoder's latents")
    return found


def _same_weights(a: nn.Module | None, b: nn.Module | None) -> bool:
    if a is None or b is None:
        return a is b
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
