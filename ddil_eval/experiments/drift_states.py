"""The states that teacher and student visit, and how far the student is from its teacher on each of them.

Three kinds of states stand at every time of the student's grid: forward-diffused data (``data``), the states of the
teacher's own rollout (``teacher``) and those of the student's own (``student``). All three share the prompt and the
noise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_core.data.base import Prompt
from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.few_step import consistency_value, earlier
from ddil_core.diffusion.noise import Sample, initial_noise, solver_noise
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor
from ddil_core.diffusion.schedule import CLEAN, Schedule, Time, rows_at, segments
from ddil_core.diffusion.solvers import SOLVERS, ddim
from ddil_core.distillation.losses import pd_target
from ddil_core.distillation.sampler import ConsistencySampler
from ddil_core.models.model import Model
from ddil_core.models.turns import actors_sampling, differences, require_one_size, take_turns
from ddil_core.support.devices import sent
from ddil_core.support.errors import WrongCommand
from ddil_core.support.finite import Finite, not_finite
from ddil_eval.features.storage import Arrays

KINDS = ("data", "teacher", "student")
"""Where states come from: forward diffusion of data, the teacher's rollouts, the student's rollouts."""


@dataclass(frozen=True)
class Drifting:
    """A teacher and a student on the student's own grid.

    Attributes:
        teacher: The teacher, which also encodes prompts and images.
        student: The student.
        actors: Both as actors. A stochastic student's actor adds noise between its steps.
        grid: The K times of the student's grid.
        consistency_step: The length of the teacher's step in the consistency target, in timesteps. On a flow they count
            before the shift.
    """

    teacher: Model
    student: Model
    actors: dict[str, Actor]
    grid: list[Time]
    consistency_step: int

    @property
    def stochastic(self) -> bool:
        """Whether the student adds noise between its steps, as LCM and DMD2 do."""
        return isinstance(self.actors[STUDENT], ConsistencySampler)

    @property
    def ends(self) -> list[Time]:
        """The times at which the K transitions end."""
        return [*self.grid[1:], CLEAN]

    @property
    def sampling(self) -> dict[str, dict[str, Any]]:
        """The steps, the solver and the guidance scale of each, for records."""
        used = actors_sampling(self.actors)
        if self.stochastic:
            used["student"]["solver"] = self.student.sampling.solver_text
        return used

    @property
    def schedule(self) -> Schedule:
        return self.teacher.denoiser.schedule


@dataclass(frozen=True)
class Visited:
    """What rollouts of B prompts have visited already. Each state is [B, C, h, w].

    Attributes:
        teacher: The K + 1 states of the teacher's rollout, from the noise to the end.
        student: Those of the student's.
        labels: Where the teacher's steps of each transition end from the student's state; None where no rollout says.
    """

    teacher: list[Tensor]
    student: list[Tensor]
    labels: list[Tensor | None]


def network_evaluations(pair: Drifting, shared: bool = False, labels: Collection[int] = ()) -> int:
    """Return the network evaluations that ``measure_states`` takes for a prompt.

    Args:
        pair: Teacher and student, whose steps are deterministic.
        shared: Whether the two rollouts are given.
        labels: The transitions whose labels of the student's states are given.
    """
    teacher, student = (pair.actors[name] for name in (TEACHER, STUDENT))
    rollouts = 0 if shared else sum(teacher.nfe) + sum(student.nfe)
    labelled = sum(teacher.nfe) + sum(nfe for k, nfe in enumerate(teacher.nfe) if k > 0 and k not in labels)
    per_place = len(KINDS) * student.denoiser.nfe + teacher.denoiser.nfe + student.denoiser.nfe
    return rollouts + labelled + len(pair.grid) * per_place


def pair_models(
    teacher: Model, student: Model, teacher_steps: int, guidance_scale: float | None, consistency_step: int
) -> Drifting:
    """Put teacher and student on the student's grid.

    A stochastic student keeps its own times; they join the teacher's grid. Any other student takes turns as in the
    covariate-shift analysis (``take_turns``).

    Args:
        teacher: The teacher.
        student: The student.
        teacher_steps: Steps of the teacher from noise to image.
        guidance_scale: The teacher's guidance. None takes the teacher's own.
        consistency_step: See ``Drifting``.

    Raises:
        WrongCommand: the two models do not fit each other, or the grids do not nest.
    """
    sampling = student.sampling
    if not (sampling.distilled and SOLVERS.find(sampling.solver).stochastic):
        return Drifting(
            teacher, student, *take_turns(teacher, student, teacher_steps, guidance_scale), consistency_step
        )
    require_one_size(teacher, student)
    if different := differences(teacher, student):
        raise WrongCommand(
            f"{student.reference!r} has another {' and another '.join(different)} than {teacher.reference!r}, so that "
            "the two cannot be compared state by state; take a student that was distilled from this teacher"
        )
    schedule = teacher.denoiser.schedule
    grid = sampling.times(schedule)
    fine = sorted({*grid, *(t for t in schedule.grid(teacher_steps) if t < grid[0])}, reverse=True)
    steps = [[step] for step in sampling.transitions(schedule)]
    actors = {
        TEACHER: Actor(teacher.guided(guidance_scale), segments(fine, grid)),
        STUDENT: ConsistencySampler(student.guided(), steps, sampling.own_solver()),
    }
    return Drifting(teacher, student, actors, grid, consistency_step)


def measure_states(
    pair: Drifting, prompts: Sequence[Prompt], images: np.ndarray, seed: int, visited: Visited | None = None
) -> Arrays:
    """Visit all states of some prompts and measure the student on each.

    Args:
        pair: Teacher and student.
        prompts: B prompts.
        images: Their images, uint8 [B, H, W, 3].
        seed: The seed of the noise.
        visited: What rollouts from the same noise have visited already. None: nothing.

    Returns:
        With K transitions, float32: the states ``states KIND`` [B, K, C, h, w]; the errors ``disagreement KIND``, and
        for a stochastic student ``end_disagreement KIND``, [B, K] (see ``_disagreement``); the ends ``end teacher`` and
        ``end student`` [B, C, h, w]; ``distance`` [B, K], ‖z^π − z^τ‖/‖z^τ‖ after each transition; and ``open teacher``
        and ``open student`` [B, K], the mean squared error of x̂ as an estimate of the actor's own end.

    Raises:
        DdilError: a state is not finite.
    """
    with torch.no_grad(), pair.teacher.compute.precision():
        return _measure_states(pair, prompts, images, seed, visited)


def _measure_states(
    pair: Drifting, prompts: Sequence[Prompt], images: np.ndarray, seed: int, visited: Visited | None
) -> Arrays:
    teacher, device = pair.teacher, pair.teacher.device
    samples = [Sample(prompt.id) for prompt in prompts]
    condition = teacher.encode([prompt.text for prompt in prompts])
    z = sent(initial_noise(samples, teacher.latent_shape, seed), device)
    x0 = teacher.encode_images(teacher.values(images))[0]
    times = [rows_at(t, z) for t in pair.grid]
    noisy = condition
    if pair.stochastic:  # as ``sample_latents`` draws it
        noise = solver_noise(samples, teacher.latent_shape, seed, len(times))
        noisy = replace(condition, noise=sent(noise.transpose(0, 1), device))
    if visited is None:
        paths = {
            "teacher": _path(pair.actors[TEACHER], z, condition),
            "student": _path(pair.actors[STUDENT], z, noisy),
        }
    else:
        paths = {"teacher": visited.teacher, "student": visited.student}
    _require_finite(pair, paths)
    known = _known_labels(len(times), paths["teacher"], visited)
    states = {"data": [pair.schedule.add_noise(x0, z, t) for t in times]}
    states |= {kind: path[:-1] for kind, path in paths.items()}
    found: dict[str, Tensor] = {}
    for kind in KINDS:
        found[f"states {kind}"] = torch.stack(states[kind], 1)
        follows = paths["teacher"] if kind == "teacher" else None
        labels = known[kind]
        columns = [_disagreement(pair, k, states[kind][k], condition, labels[k], follows) for k in range(len(times))]
        found |= {f"{name} {kind}": torch.stack([column[name] for column in columns], 1) for name in columns[0]}
    ends = {kind: path[-1] for kind, path in paths.items()}
    for kind, name in (("teacher", TEACHER), ("student", STUDENT)):
        denoiser = pair.actors[name].denoiser
        errors = [_mean((denoiser(paths[kind][k], t, condition) - ends[kind]).square()) for k, t in enumerate(times)]
        found |= {f"open {kind}": torch.stack(errors, 1), f"end {kind}": ends[kind]}
    pairs = zip(paths["student"][1:], paths["teacher"][1:], strict=True)
    found["distance"] = torch.stack([(_mean((a - b).square()) / _mean(b.square())).sqrt() for a, b in pairs], 1)
    return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def _path(actor: Actor, z: Tensor, condition: Condition) -> list[Tensor]:
    """Return the K + 1 states of an actor's rollout, from the noise to the end."""
    path = [z]
    for transition in range(len(actor.steps)):
        path.append(actor.act(transition, path[-1], condition))
    return path


def _known_labels(count: int, teacher: Sequence[Tensor], visited: Visited | None) -> dict[str, list[Tensor | None]]:
    """Return for each kind of states where the teacher's steps of each transition end, or None where nobody knows.

    At the first transition the student's state is the teacher's.
    """
    student: list[Tensor | None] = [None] * count if visited is None else list(visited.labels)
    return {"data": [None] * count, "teacher": list(teacher[1:]), "student": [teacher[1], *student[1:]]}


def _disagreement(
    pair: Drifting, k: int, z: Tensor, condition: Condition, z_s: Tensor | None, follows: list[Tensor] | None
) -> dict[str, Tensor]:
    """Return the student's training loss at states z [B, C, h, w] of transition k, by its name, each [B].

    For a deterministic student ``disagreement`` is progressive distillation's loss, max(1, SNR) ‖x̂ − x̃‖²: x̃ is what
    the teacher's steps of this transition amount to. For a stochastic student it is the squared consistency loss
    ‖f(z_t, t) − f(z_s, s)‖² over one step t → s of the teacher, and ``end_disagreement`` is ‖f(z_t, t) − z_0‖² to the
    end z_0 of the teacher's trajectory from z_t. All norms are means over the entries.

    Args:
        pair: Teacher and student.
        k: The transition.
        z: The states.
        condition: B rows.
        z_s: Where the teacher's steps of this transition end, if that is known.
        follows: The teacher's path, if z lies on it: then its end is known.
    """
    t, schedule = rows_at(pair.grid[k], z), pair.schedule
    teacher, student = pair.actors[TEACHER], pair.actors[STUDENT].denoiser
    x0 = student(z, t, condition)
    if not pair.stochastic:
        z_s = teacher.act(k, z, condition) if z_s is None else z_s
        target = pd_target(schedule, z, z_s, t, rows_at(pair.ends[k], z))
        return {"disagreement": schedule.snr(t).to(z.dtype).clamp(min=1.0) * _mean((x0 - target).square())}
    s = rows_at(earlier(schedule, pair.grid[k], pair.consistency_step), z)
    z_s = ddim(schedule, z, t, s, teacher.denoiser(z, t, condition))[0]
    value = _consistency(pair, z, t, x0)
    target = _consistency(pair, z_s, s, student(z_s, s, condition))
    end = z if follows is None else follows[-1]
    for later in range(k, len(pair.grid)) if follows is None else ():
        end = teacher.act(later, end, condition)
    return {
        "disagreement": _mean((value - target).square()),
        "end_disagreement": _mean((value - end).square()),
    }


def _consistency(pair: Drifting, z: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Return the consistency function of x̂; of a student of TCD its jump to timestep 0."""
    if pair.student.sampling.solver == "tcd":
        return ddim(pair.schedule, z, t, torch.zeros_like(t), x0)[0]
    return consistency_value(pair.schedule, z, t, x0)


def _mean(values: Tensor) -> Tensor:
    """Return the mean over the entries of each row, [B]."""
    return values.flatten(1).mean(1)


def _require_finite(pair: Drifting, paths: dict[str, list[Tensor]]) -> None:
    """Refuse rollouts with states that are not finite. Raises DdilError."""
    models: dict[str, Any] = {"teacher": pair.teacher, "student": pair.student}
    for kind, path in paths.items():
        finite = Finite[int]()
        for k, z in enumerate(path):
            finite.see(k, z)
        if (broken := finite.first_broken()) is not None:
            model = models[kind]
            place = f"after transition {broken} of {len(pair.grid)}"
            raise not_finite("the latents", place, f"the {kind} {model.reference!r}", [model.denoiser.net])
