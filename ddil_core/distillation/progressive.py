"""Progressive distillation (Salimans & Ho, 2202.00512), and DDIL on it (Algorithms 1 and 2 of the appendix).

A stage teaches a student of N steps what its teacher does in 2N. Without DDIL the states are forward-diffused data; with it a
part of every batch comes from the aggregated dataset, whose rollouts the student shares with its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, Denoiser, GuidedDenoiser
from ddil_core.diffusion.rollout import STUDENT, Actor, pair_actors, strings_at
from ddil_core.diffusion.schedule import segments
from ddil_core.diffusion.solvers import ddim
from ddil_core.distillation.aggregate import AggregatedDataset
from ddil_core.distillation.clipping import Clipped
from ddil_core.distillation.config import DdilConfig, PhaseConfig, ProgressiveConfig, StageConfig
from ddil_core.distillation.conversion import convert_to_v
from ddil_core.distillation.loop import Logs
from ddil_core.distillation.losses import pd_loss, pd_target
from ddil_core.distillation.run import Run
from ddil_core.distillation.sources import SourcedStage, TransitionBatch
from ddil_core.distillation.student import Student
from ddil_core.distillation.training import train_stage
from ddil_core.models.sampling import Sampling


def train_progressive(run: Run[ProgressiveConfig]) -> Student:
    """The stages in turn; each finished one leaves ``checkpoints/stage-I-of-N.safetensors``, which is not made again."""
    convert_to_v(run)
    guided = run.model.guided(run.config.guidance_scale, run.reflection)
    net: nn.Module = run.model.denoiser.net
    for index, stage in enumerate(run.config.stages):
        teacher = GuidedDenoiser(run.frozen(net), reflection=run.reflection)
        if index == 0:
            teacher = GuidedDenoiser(teacher.network, guided.unconditional, guided.guidance_scale, run.reflection)
        make = partial(ProgressiveStage, teacher, run.pool, stage, run.config, run.accelerator, index, net)
        name = f"stage-{index + 1}-of-{len(run.config.stages)}"
        net = train_stage(run, make, net, name, f"{2 * stage.steps} → {stage.steps} steps")
        run.model.denoiser.net.to("cpu")  # nothing asks the first teacher again
    return Student(net, run.model.denoiser.prediction, ddim_sampling(run.config.student_steps))


def ddim_sampling(steps: int) -> Sampling:
    return Sampling(solver="ddim", steps=steps, guidance_scale=1.0, distilled=True)


class ProgressiveStage(SourcedStage):
    """One stage: student ← teacher, then ``update`` after ``update``. Rollouts use the student as it is, not its average."""

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        stage: StageConfig,
        config: ProgressiveConfig,
        accelerator: Accelerator,
        index: int = 0,
        start: nn.Module | None = None,
    ) -> None:
        super().__init__(teacher, pool, stage.updates, config, accelerator, index, start)
        self.stage, self.draws = stage, stage.updates
        self.sampling = ddim_sampling(stage.steps)
        self.grid, self.teacher_grid = self.schedule.grid(stage.steps), self.schedule.grid(2 * stage.steps)
        steps = segments(self.teacher_grid, self.grid)
        self.table = torch.tensor([[t, middle, s] for (t, middle), (_, s) in steps], device=self.device)
        self.times = self.table[:, 0]
        self.make_dataset()

    def _update(self, step: int) -> Logs:
        """One optimiser step; returns tensors that need no synchronisation until they are read."""
        states, aggregated = self._draw(step)
        clipped = Clipped(self.teacher.reflection, len(self.schedule))

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(states)):
                z, t = states.z[rows], self.times[states.transition[rows].to(self.device)]
                with self.accelerator.autocast():
                    x0 = self.student(z, t, self.condition(states.row[rows]))
                clipped.see(x0, t)
                yield share * pd_loss(x0.float(), states.target[rows], self.schedule.snr(t))

        return self.descend(losses(), step) | clipped.logs() | self.shares(aggregated)

    def label(self, z: Tensor, transition: Tensor, row: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The teacher's two DDIM steps t → t' → s from z, and the x̃ that they amount to; transitions differ by row."""
        t, middle, s = self.table[transition.to(self.device)].unbind(1)
        with torch.no_grad(), self.accelerator.autocast():
            return two_step_target(self.teacher, z, t, middle, s, self.condition(row))

    def target(self, seen: TransitionBatch) -> Tensor:
        """Where the teacher acted, its two steps are the state's target."""
        if seen.actor == STUDENT:
            return super().target(seen)
        t, _, s = self.table[seen.place.to(self.device)].unbind(1)
        return pd_target(self.schedule, seen.z_t, seen.z_s, t, s)

    def _collect(
        self, dataset: AggregatedDataset, ddil: DdilConfig, phase: PhaseConfig, wanted: int, step: int
    ) -> None:
        """Algorithm 1: roll out as many trajectories as give ``wanted`` uses; keep every state that they visit, and its target."""
        generator, steps = self.generator(step, 1), self.stage.steps
        count = math.ceil(wanted / (ddil.uses * steps))
        row = torch.randint(len(self.pool), (count,), generator=generator)
        z = torch.randn((count, *self.pool.mean.shape[1:]), generator=generator).to(self.device)
        strings = strings_at(phase.p_teacher, torch.rand(count, steps, generator=generator, dtype=torch.float64))
        visited = self._walk(self._actors(), strings, z, self.condition(row), row, range(steps))
        dataset.enqueue(dataset.add(visited), generator)

    def _actors(self) -> dict[str, Actor]:
        """Who collects. The student's step to the end is not taken: no state that is trained on lies behind it."""
        actors = pair_actors(self.teacher, GuidedDenoiser(self.student), self.teacher_grid, self.grid)
        student = actors[STUDENT]
        return actors | {STUDENT: replace(student, steps=[*student.steps[:-1], []])}


def two_step_target(teacher: Denoiser, z: Tensor, t: Tensor, middle: Tensor, s: Tensor, condition: Condition) -> Tensor:
    """PD's target x̃ for z_t [B, …] and times int64 [B]: two DDIM steps of the teacher, t → middle → s."""
    z_middle, _ = ddim(teacher.schedule, z, t, middle, teacher(z, t, condition))
    z_s, _ = ddim(teacher.schedule, z_middle, middle, s, teacher(z_middle, middle, condition))
    return pd_target(teacher.schedule, z, z_s, t, s)
