"""A teacher and a student that take turns in a rollout, and the parts that the two models must share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.rollout import NAMES, STUDENT, TEACHER, Actor, pair_actors, rollout_latents
from ddil_core.diffusion.schedule import Time
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.autoencoder import SCALING
from ddil_core.models.generate import require_prompts
from ddil_core.models.model import Model
from ddil_core.support.devices import sent
from ddil_core.support.errors import WrongCommand
from ddil_core.support.progress import warn
from ddil_core.support.size import pixels


def rollout(
    teacher: Model,
    student: Model,
    prompts: Sequence[str],
    strings: Sequence[str],
    *,
    teacher_steps: int = 32,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> np.ndarray:
    """Return images of rollouts in which teacher and student take turns, uint8 [prompts, strings, H, W, 3].

    All rollouts of a prompt start from the same noise: the noise of the prompt's first image in ``sample``.

    Args:
        teacher: The model that acts at a "T". The teacher also encodes the prompts and decodes the latents.
        student: The model that acts at an "S". The student must share the teacher's text encoders, autoencoder and
            schedule.
        prompts: Texts. The empty text is allowed.
        strings: One letter for each step of the student, such as "TTSS" for a student with 4 steps.
        teacher_steps: Steps of the teacher from noise to image, a multiple of the student's steps.
        guidance_scale: The teacher's guidance. None takes the teacher's own.
        seed: The seed of the noise.
        batch_size: The most rows of a batch on the device.

    Raises:
        WrongCommand: the models do not fit each other, the grids do not nest, a string has another length or another
            letter, or no tokenizer takes a prompt.
        DdilError: the latents or images are not finite.
    """
    require_prompts(prompts)
    actors, student_grid = take_turns(teacher, student, teacher_steps, guidance_scale)
    _require_strings(strings, len(student_grid))
    if not prompts or not strings:
        raise WrongCommand("a rollout needs at least one prompt and one string; name both")
    z = sent(initial_noise([Sample(prompt) for prompt in prompts], teacher.latent_shape, seed), teacher.device)
    wanted = [set(strings)] * len(prompts)
    batch_size = min(batch_size, sum(map(len, wanted)))  # batches are filled up, and no level has more rows
    names = {TEACHER: f"{NAMES[TEACHER]} {teacher.reference!r}", STUDENT: f"{NAMES[STUDENT]} {student.reference!r}"}
    with teacher.compute.precision():
        result = rollout_latents(actors, z, teacher.encode(prompts), wanted, batch_size=batch_size, names=names)
        images = teacher.decode(result.latents)
    place = {end: row for row, end in enumerate(zip(result.sample, result.string, strict=True))}
    return np.stack([[images[place[row, string]] for string in strings] for row in range(len(prompts))])


def _require_strings(strings: Sequence[str], length: int) -> None:
    """Raises WrongCommand: a string has another length, or holds another letter than T and S."""
    for string in strings:
        if len(string) != length or set(string) - {TEACHER, STUDENT}:
            raise WrongCommand(
                f"the string {string!r} does not fit: write one letter for each of the student's {length} steps, "
                "'T' where the teacher acts and 'S' where the student acts"
            )


def take_turns(
    teacher: Model,
    student: Model,
    teacher_steps: int = 32,
    guidance_scale: float | None = None,
    solver: str = "ddim",
) -> tuple[dict[str, Actor], list[Time]]:
    """Return teacher and student as the actors of a rollout, and the student's grid, on which the two meet.

    A student that was distilled for a number of steps takes that number of steps with its own guidance. Any other
    student takes 4 steps without guidance.

    Args:
        teacher: The model that acts at a "T".
        student: The model that acts at an "S".
        teacher_steps: Steps of the teacher from noise to image, a multiple of the student's steps.
        guidance_scale: The teacher's guidance. None takes the teacher's own.
        solver: Takes the steps of both.

    Raises:
        WrongCommand: the student's grid does not nest in the teacher's; the two models differ in the size of images,
            the layout, the noise schedule, the text encoders or the autoencoder; or the solver does not exist or cannot
            serve in a rollout.
    """
    require_one_size(teacher, student)
    different = differences(teacher, student)
    if different:
        raise WrongCommand(
            f"{student.reference!r} has another {' and another '.join(different)} than {teacher.reference!r}, "
            "so that the two cannot take turns; take a student that was distilled from this teacher"
        )
    student_sampling, schedule = student.sampling, teacher.denoiser.schedule
    distilled = student_sampling.distilled
    if distilled and SOLVERS.find(student_sampling.solver).stochastic:
        warn(
            f"{student.reference!r} was made for the solver {student_sampling.solver!r}; here it takes deterministic "
            "steps"
        )
    student_grid = schedule.grid(student_sampling.steps if distilled and student_sampling.steps else 4)
    denoisers = teacher.guided(guidance_scale), student.guided(None if distilled else 1.0)
    grids = schedule.grid(teacher_steps), student_grid
    return pair_actors(*denoisers, *grids, SOLVERS.find(solver)), student_grid


def require_one_size(teacher: Model, student: Model) -> None:
    """Refuse two models that draw images of different sizes.

    Raises:
        WrongCommand: they do.
    """
    if teacher.image_size != student.image_size:
        raise WrongCommand(
            f"{student.reference!r} draws images of {pixels(student.image_size)} and {teacher.reference!r} of "
            f"{pixels(teacher.image_size)}; give both one size with --height and --width (in Python, of load_model)"
        )


def actors_sampling(actors: Mapping[str, Actor]) -> dict[str, dict[str, Any]]:
    """Return the steps, the solver and the guidance scale of teacher and student in a rollout, for records."""
    used = {}
    for role, name in ((TEACHER, "teacher"), (STUDENT, "student")):
        actor = actors[role]
        steps, guided = sum(len(part) for part in actor.steps), cast(GuidedDenoiser, actor.denoiser)
        used[name] = {"steps": steps, "solver": actor.solver.name, "guidance_scale": guided.guidance_scale}
    return used


def differences(teacher: Model, student: Model) -> list[str]:
    """Name the parts that the two models must share to take turns, and do not share."""
    if teacher.layout.encode is not student.layout.encode:
        return ["layout"]
    different = []
    a, b = teacher.denoiser.schedule, student.denoiser.schedule
    if type(a) is not type(b) or not torch.equal(a.alphas, b.alphas) or a.grid(4) != b.grid(4):
        different.append("noise schedule")
    shared = ("text_encoder", "text_encoder_2", "text_encoder_3"), ("vae",)
    for parts, title in zip(shared, ("text encoder", "autoencoder"), strict=True):
        if not all(
            _same_weights(*(getattr(model.pipeline, part, None) for model in (teacher, student))) for part in parts
        ):
            different.append(title)
    scalings = [[model.pipeline.vae.config.get(key) for key in SCALING] for model in (teacher, student)]
    if "autoencoder" not in different and scalings[0] != scalings[1]:
        different.append("scaling of the autoencoder's latents")
    return different


def _same_weights(a: nn.Module | None, b: nn.Module | None) -> bool:
    if a is None or b is None:
        return a is b
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name].to(x[name].device)) for name in x)
