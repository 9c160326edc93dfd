"""Progressive distillation (Salimans & Ho, 2202.00512), and DDIL on it (Algorithms 1 and 2 of the appendix).

A stage teaches a student of N steps what its teacher does in 2N. Without DDIL the states are forward-diffused data; with it a
part of every batch comes from the aggregated dataset, whose rollouts the student shares with its teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.aggregate import AggregatedDataset
from ddil_core.data import LatentPool
from ddil_core.denoiser import Condition, Denoiser, GuidedDenoiser
from ddil_core.distill.config import DdilConfig, DistillConfig, PhaseConfig, StageConfig
from ddil_core.distill.stage import Stage
from ddil_core.losses import pd_loss, pd_target
from ddil_core.rollout import STUDENT, TEACHER, Actor, pair, rollout, strings_at
from ddil_core.schedule import segments
from ddil_core.solvers import ddim
from ddil_core.train import Logs, Stateful


@dataclass(frozen=True)
class States:
    """States ``z`` [B, C, H, W] at the ``transition`` [B] of the student's grid, with their targets x̃ ``target`` [B, C, H, W] and
    the pool's ``row`` [B] for the caption."""

    z: Tensor
    target: Tensor
    transition: Tensor
    row: Tensor

    def split(self, size: int) -> list[States]:
        """Consecutive parts of ``size`` states."""
        columns = (column.split(size) for column in (self.z, self.target, self.transition, self.row))
        return [States(*parts) for parts in zip(*columns, strict=True)]

    @staticmethod
    def cat(a: States, b: States) -> States:
        columns = zip((a.z, a.target, a.transition, a.row), (b.z, b.target, b.transition, b.row), strict=True)
        return States(*(torch.cat(pair) for pair in columns))


class ProgressiveStage(Stage):
    """One stage: student ← teacher, then ``update`` after ``update``. Rollouts use the student as it is, not its average."""

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        stage: StageConfig,
        config: DistillConfig,
        accelerator: Accelerator,
        index: int = 0,
        start: nn.Module | None = None,
    ) -> None:
        super().__init__(teacher, pool, stage.updates, config, accelerator, index, teacher.network.prediction, start)
        self.stage = stage
        self.grid, self.teacher_grid = self.schedule.grid(stage.steps), self.schedule.grid(2 * stage.steps)
        steps = segments(self.teacher_grid, self.grid)
        self.table = torch.tensor([[t, middle, s] for (t, middle), (_, s) in steps], device=self.device)
        self._ahead: list[States] = []
        self._ahead_from = 0
        self.dataset: AggregatedDataset | None = None
        if config.ddil is not None:
            self.dataset = AggregatedDataset(
                config.ddil.capacity, config.ddil.uses, tuple(pool.mean.shape[1:]), self.device
            )

    def stateful(self) -> dict[str, Stateful]:
        parts = super().stateful()
        return parts if self.dataset is None else parts | {"dataset": self.dataset}

    def update(self, step: int) -> Logs:
        """One optimiser step; returns tensors that need no synchronisation until they are read."""
        states, aggregated = self._draw(step)
        t = self.table[states.transition.to(self.device), 0]
        with self.accelerator.autocast():
            x0 = self.student(states.z, t, self.condition(states.row))
        logs = self.descend(pd_loss(x0.float(), states.target, self.schedule.snr(t)), step)
        if self.teacher.reflection is not None:
            logs["clipped_fraction"] = self.teacher.reflection.clipped_fraction(x0.detach())
        if self.dataset is not None:
            logs["aggregated_fraction"] = aggregated / len(states.z)
        return logs

    def _draw(self, step: int) -> tuple[States, int]:
        """Forward-diffused data, then aggregated states, in the shares of the phase; and how many of the latter there are."""
        size, first, end = self.config.batch_size, 0, self.updates
        if self.dataset is None or self.config.ddil is None:
            return self._data(step, size, first, end), 0
        phase, first, end = phase_at(self.config.ddil.phases, step, end)
        count = round(phase.aggregated * size)
        if self.dataset.pending < count:
            horizon = min(self.config.ddil.collect_every, end - step)
            self._collect(self.dataset, self.config.ddil, phase, horizon * count - self.dataset.pending, step)
        aggregated = States(*self.dataset.take(count))
        if count == size:
            return aggregated, count
        return States.cat(self._data(step, size - count, first, end), aggregated), count

    def _data(self, step: int, count: int, first: int, end: int) -> States:
        """This update's ``count`` forward-diffused states, of a phase from ``first`` to ``end``.

        The teacher labels those of several updates together. Which ones go together depends on the update's number alone, so
        that a resumed run labels the same batch again.
        """
        together = max(1, self.config.teacher_batch_size // count)
        start = step - (step - first) % together
        if start != self._ahead_from or not self._ahead:
            self._ahead_from = start
            self._ahead = self._diffuse(range(start, min(start + together, end)), count).split(count)
        return self._ahead[step - start]

    def _diffuse(self, steps: range, count: int) -> States:
        """``count`` forward-diffused states for each of some updates, with the teacher's targets."""
        drawn = []
        for step in steps:
            generator = self.generator(step, 0)
            x0, row = self.pool.draw(count, generator)
            transition = torch.randint(self.stage.steps, (count,), generator=generator)
            drawn.append((x0, row, transition, torch.randn(x0.shape, generator=generator)))
        x0, row, transition, eps = (torch.cat(column) for column in zip(*drawn, strict=True))
        t = self.table[transition.to(self.device), 0]
        z = self.schedule.add_noise(x0.to(self.device), eps.to(self.device), t)
        return States(z, self._teach(z, transition, self.condition(row)), transition, row)

    def _collect(
        self, dataset: AggregatedDataset, ddil: DdilConfig, phase: PhaseConfig, wanted: int, step: int
    ) -> None:
        """Algorithm 1: roll out as many trajectories as give ``wanted`` uses; keep every state that they visit, and its target."""
        generator = self.generator(step, 1)
        count = math.ceil(wanted / (ddil.uses * self.stage.steps))
        row = torch.randint(len(self.pool), (count,), generator=generator)
        z = torch.randn((count, *self.pool.mean.shape[1:]), generator=generator).to(self.device)
        draws = torch.rand(count, self.stage.steps, generator=generator, dtype=torch.float64)
        condition = self.condition(row)
        places: list[int] = []

        def observe(actor: str, transition: int, rows: Tensor, z_t: Tensor, z_s: Tensor) -> None:
            if actor == TEACHER:  # its two steps from here are this state's target
                ends = self.table[transition].expand(len(z_t), 3)
                target = pd_target(self.schedule, z_t, z_s, ends[:, 0], ends[:, 2])
            else:
                target = self._teach(z_t, torch.full_like(rows, transition), condition.rows(rows.to(self.device)))
            places.extend(dataset.add(z_t, transition, row[rows], target))

        strings = [{string} for string in strings_at(phase.p_teacher, draws)]
        size = self.config.teacher_batch_size
        with self.accelerator.autocast():
            rollout(self._actors(), z, condition, strings, batch_size=size, observe=observe, pad=False)
        dataset.enqueue(places, generator)

    def _actors(self) -> dict[str, Actor]:
        """Who collects. The student's step to the end is not taken: no state that is trained on lies behind it."""
        actors = pair(self.teacher, GuidedDenoiser(self.student), self.teacher_grid, self.grid)
        student = actors[STUDENT]
        return actors | {STUDENT: replace(student, steps=[*student.steps[:-1], []])}

    @torch.no_grad()
    def _teach(self, z: Tensor, transition: Tensor, condition: Condition) -> Tensor:
        """The teacher's two DDIM steps t → t' → s from z, and the x̃ that they amount to; transitions differ by row."""
        t, middle, s = self.table[transition.to(self.device)].unbind(1)
        with self.accelerator.autocast():
            return two_step_target(self.teacher, z, t, middle, s, condition)


def two_step_target(teacher: Denoiser, z: Tensor, t: Tensor, middle: Tensor, s: Tensor, condition: Condition) -> Tensor:
    """PD's target x̃ for z_t [B, …] and times int64 [B]: two DDIM steps of the teacher, t → middle → s."""
    z_middle, _ = ddim(teacher.schedule, z, t, middle, teacher(z, t, condition))
    z_s, _ = ddim(teacher.schedule, z_middle, middle, s, teacher(z_middle, middle, condition))
    return pd_target(teacher.schedule, z, z_s, t, s)


def phase_at(phases: tuple[PhaseConfig, ...], step: int, updates: int) -> tuple[PhaseConfig, int, int]:
    """The phase that an update is in, its first update, and the update at which it ends."""
    first = 0
    for phase in phases:
        end = round(phase.until * updates)
        if step < end:
            return phase, first, end
        first = end
    raise IndexError(f"update {step} is past the stage's {updates}")
