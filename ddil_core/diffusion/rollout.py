"""Rollouts in which teacher and student take turns. Dataset aggregation and Tables 2-4 use the same engine.

At each transition of the student's grid one of the two acts. The student takes one solver step, the teacher takes the
steps of its finer grid. A string such as ``"TTSS"`` says who acts when. Strings with the same prefix share its states,
so the strings of a sample form a tree. The engine grows the tree level by level: each actor runs once over all rows
that need it, in full batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition, Denoiser
from ddil_core.diffusion.integrate import integrate
from ddil_core.diffusion.schedule import Time, Transition, segments, transitions
from ddil_core.diffusion.solvers import SOLVERS, Solver, require_start
from ddil_core.support.devices import sent
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.finite import Finite, not_finite

TEACHER, STUDENT = "T", "S"
NAMES = {TEACHER: "the teacher", STUDENT: "the student"}
"""The names of the actors in messages. A caller may pass longer ones."""
Observe = Callable[[str, int, Tensor, Tensor, Tensor], None]
"""``observe(actor, transition, rows, z_t, z_s)`` is called after every batch.

``rows``, int64 [B] on the CPU, are the samples.
"""


@dataclass(frozen=True)
class Actor:
    """A denoiser with its steps.

    Attributes:
        denoiser: Gives x̂.
        steps: For each transition of the student's grid, the denoiser's own transitions inside it.
        solver: Takes the steps.
    """

    denoiser: Denoiser
    steps: list[list[Transition]]
    solver: Solver = SOLVERS["ddim"]

    def __post_init__(self) -> None:
        require_stateless(self.solver)
        for start, _ in self.steps[0][:1]:  # in training, the rollouts of a student of one step have no step
            require_start(self.solver, self.denoiser.schedule, start)

    @property
    def nfe(self) -> list[int]:
        """The network evaluations of one row, for each transition."""
        schedule, nfe = self.denoiser.schedule, self.denoiser.nfe
        return [self.solver.calls(schedule, steps) * nfe for steps in self.steps]

    def act(self, transition: int, z: Tensor, condition: Condition) -> Tensor:
        """Return the latents at the end of a transition from the latents ``z`` at its start."""
        return integrate(self.denoiser, self.solver, z, condition, self.steps[transition])


def pair_actors(
    teacher: Denoiser,
    student: Denoiser,
    teacher_grid: Sequence[Time],
    student_grid: Sequence[Time],
    solver: Solver = SOLVERS["ddim"],
) -> dict[str, Actor]:
    """Return a teacher and a student that meet at every time of the student's grid.

    Args:
        teacher: The denoiser that acts at "T".
        student: The denoiser that acts at "S".
        teacher_grid: The teacher's falling times, among them all times of the student.
        student_grid: The student's falling times.
        solver: Takes the steps of both.

    Raises:
        WrongCommand: the student's grid does not nest in the teacher's, or the solver cannot serve two actors on this
            schedule.
    """
    return {
        TEACHER: Actor(teacher, segments(teacher_grid, student_grid), solver),
        STUDENT: Actor(student, [[step] for step in transitions(student_grid)], solver),
    }


def require_stateless(solver: Solver) -> None:
    """Refuse a solver that carries state or noise.

    Teacher and student can replace each other only where steps are independent.

    Raises:
        WrongCommand: the solver carries state or noise.
    """
    if solver.stateful or solver.stochastic:
        raise WrongCommand(
            f"the solver {solver.name!r} carries state or noise from step to step, so that teacher and student cannot "
            "take turns with it; use 'ddim'"
        )


def all_strings(length: int) -> list[str]:
    """Return all 2^length strings, from the teacher alone to the student alone."""
    return ["".join(actors) for actors in product(TEACHER + STUDENT, repeat=length)]


def strings_at(p_teacher: float, draws: Tensor) -> list[str]:
    """Return the string of each sample: the teacher acts at the transitions with u < p_teacher.

    ``draws`` are the decisions u [B, K] of ``noise.decisions``.

    Raises:
        WrongCommand: p_teacher is outside [0, 1].
    """
    if not 0 <= p_teacher <= 1:
        raise WrongCommand(f"p_teacher is a probability, from 0 (student alone) to 1 (teacher alone), not {p_teacher}")
    return ["".join(TEACHER if acts else STUDENT for acts in row) for row in (draws < p_teacher).tolist()]


@dataclass
class RolloutResult:
    """The latents at the ends of the strings.

    Attributes:
        latents: [M, C, H, W].
        sample: The row of z_T from which each of the M latents comes.
        string: The string of each of the M latents.
        evaluations: Network evaluations by actor. Padding does not count.
        kept: For each prefix that was to be kept: the latents at its end, [rows, C, H, W], of all samples that have it,
            in the order of their rows.
    """

    latents: Tensor
    sample: list[int]
    string: list[str]
    evaluations: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def rollout_latents(
    actors: dict[str, Actor],
    z: Tensor,
    condition: Condition,
    strings: Sequence[Collection[str]],
    *,
    batch_size: int,
    observe: Observe | None = None,
    pad: bool = True,
    names: Mapping[str, str] = NAMES,
    keep: Collection[str] = (),
) -> RolloutResult:
    """Roll every sample out along each of its strings.

    Args:
        actors: The actors by their letter.
        z: z_T [B, C, H, W], on the device of the actors.
        condition: B rows.
        strings: The strings of each sample. All have the same length.
        batch_size: Rows of every batch on the device.
        observe: Called with every batch, without padding.
        pad: Fill the last batch up. Then all batches have one shape, and equal rows give equal bits.
        names: The names of the actors in messages.
        keep: Prefixes of strings, such as "ST", whose states are kept too. A prefix of no string is left out.

    Raises:
        DdilError: an actor's states are not finite.
    """
    length = len(next(iter(strings[0])))
    nodes = [(row, "") for row in range(len(z))]
    evaluations, finite = dict.fromkeys(actors, 0), Finite[tuple[str, int]]()
    kept: dict[str, Tensor] = {}
    for transition in range(length):
        children = sorted({(row, string[: transition + 1]) for row, wanted in enumerate(strings) for string in wanted})
        place = {node: index for index, node in enumerate(nodes)}
        next_z = z.new_empty((len(children), *z.shape[1:]))
        for name, actor in actors.items():
            indices = [index for index, (_, prefix) in enumerate(children) if prefix[-1] == name]
            evaluations[name] += len(indices) * actor.nfe[transition]
            parents = [place[children[index][0], children[index][1][:-1]] for index in indices]
            samples = [children[index][0] for index in indices]
            on_host = torch.tensor([indices, parents, samples], dtype=torch.long)
            table = sent(on_host, z.device)
            for start in range(0, len(indices), batch_size):
                to, source, rows = table[:, start : start + batch_size]
                real = len(rows)
                width = batch_size if pad else real
                before = z.index_select(0, _pad(source, width))
                after = actor.act(transition, before, condition.rows(_pad(rows, width)))[:real]
                finite.see((name, transition), after)
                next_z.index_copy_(0, to, after)
                if observe is not None:
                    observe(name, transition, on_host[2, start : start + real], before[:real], after)
        nodes, z = children, next_z
        for prefix in {prefix for _, prefix in children} & set(keep):
            ends = torch.tensor([index for index, (_, other) in enumerate(children) if other == prefix])
            kept[prefix] = z.index_select(0, sent(ends, z.device))
    if (broken := finite.first_broken()) is not None:
        raise _not_finite(actors[broken[0]], names[broken[0]], broken[1])
    return RolloutResult(z, [row for row, _ in nodes], [string for _, string in nodes], evaluations, kept)


def _not_finite(actor: Actor, name: str, transition: int) -> DdilError:
    """Return the error for states of an actor that are not finite after a transition."""
    network = getattr(actor.denoiser, "network", actor.denoiser)
    times = ", ".join(f"t = {t:g}" for t, _ in actor.steps[transition])
    place = f"after transition {transition + 1} of {len(actor.steps)}, with steps at {times}"
    return not_finite("the latents", place, name, [network] if isinstance(network, nn.Module) else [])


def _pad(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else torch.cat([rows, rows[:1].expand(size - len(rows))])
