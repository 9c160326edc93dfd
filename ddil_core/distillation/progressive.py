"""Progressive distillation (Salimans & Ho, 2202.00512), and DDIL on it (Algorithms 1 and 2 of the appendix).

A stage teaches a student to do in N steps what its teacher does in 2N. Without DDIL all states are forward-diffused
data. With DDIL a part of every batch comes from the aggregated dataset. Teacher and student take turns in the rollouts
that fill it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, Denoiser, GuidedDenoiser
from ddil_core.diffusion.rollout import STUDENT, pair_actors
from ddil_core.diffusion.schedule import segments
from ddil_core.diffusion.solvers import ddim
from ddil_core.distillation.adapters import with_lora
from ddil_core.distillation.clipping import ClippedFraction
from ddil_core.distillation.collectors import Labeler, MixedCollector, TransitionBatch
from ddil_core.distillation.config import ProgressiveConfig, StageConfig
from ddil_core.distillation.context import StageContext
from ddil_core.distillation.conversion import convert_to_v
from ddil_core.distillation.losses import pd_loss, pd_target
from ddil_core.distillation.run import Run
from ddil_core.distillation.sources import MixedSource
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.start import starting_network
from ddil_core.distillation.student import Student, merged, save_student
from ddil_core.distillation.training import train_stage
from ddil_core.distillation.training_log import Logs
from ddil_core.models.sampling import Bounds, Sampling
from ddil_core.support.devices import sent


def train_progressive(run: Run[ProgressiveConfig]) -> Student:
    """Train all stages in order.

    A finished stage leaves ``checkpoints/stage-I-of-N.safetensors`` and is not trained again. With ``keep_stages`` it
    also leaves its student, ``stages/N-steps``.

    A LoRA is trained on through all stages, beside the first teacher's frozen weights. The teacher of a later stage is
    a copy with the LoRA merged in, which shares with them only the weights that have no adapters.
    """
    convert_to_v(run)
    guided, lora = run.model.guided(run.config.guidance_scale, run.reflection), run.config.lora
    net = starting_network(run)
    for index, stage in enumerate(run.config.stages):
        if index == 0:
            given = guided.unconditional, guided.guidance_scale, run.reflection
            teacher = GuidedDenoiser(run.frozen(run.model.denoiser.net), *given)
            net = net if lora is None else with_lora(net, lora)
        else:
            teacher = GuidedDenoiser(run.frozen(net if lora is None else merged(net)), reflection=run.reflection)
            if lora is not None and run.config.student_dtype != "float32":
                net.to("cpu")  # the student holds its own base in another dtype
        make = partial(ProgressiveStage, teacher, run.pool, stage, run.config, run.accelerator, index, net)
        name = f"stage-{index + 1}-of-{len(run.config.stages)}"
        net = train_stage(run, make, net, name, f"{2 * stage.steps} → {stage.steps} steps")
        run.model.denoiser.net.to("cpu")  # the first teacher is not used again
        student = Student(net, run.model.denoiser.prediction, ddim_sampling(stage.steps), lora is not None)
        if run.config.keep_stages and run.accelerator.is_main_process:
            _keep(run, student, stage.steps)
    return student


def _keep(run: Run[ProgressiveConfig], student: Student, steps: int) -> None:
    """Save the student of a stage in the run folder, unless an earlier call has."""
    folder = run.out / "stages" / f"{steps}-steps"
    if not folder.is_dir():
        bounds = Bounds.of(run.reflection, run.config.reflection.quantile)
        save_student(run.model, student, bounds, folder, run.config.teacher_use())


def ddim_sampling(steps: int) -> Sampling:
    """Return how a student of ``steps`` DDIM steps is sampled."""
    return Sampling(solver="ddim", steps=steps, guidance_scale=1.0, distilled=True)


class ProgressiveLabeler(Labeler):
    """The target of a state is the x̃ to which the teacher's two DDIM steps amount."""

    has_targets = True

    def __init__(self, context: StageContext, teacher: Denoiser, table: Tensor) -> None:
        """``table`` [K, 3] holds t, t' and s of every transition t → t' → s."""
        self.context, self.teacher, self.table = context, teacher, table

    def label(self, z: Tensor, transition: Tensor, row: Tensor, guidance: Tensor | None = None) -> Tensor:
        t, middle, s = self.table[sent(transition, self.context.device)].unbind(1)
        with torch.no_grad(), self.context.accelerator.autocast():
            return two_step_target(self.teacher, z, t, middle, s, self.context.condition(row))

    def label_transitions(self, batch: TransitionBatch) -> Tensor:
        """Take the teacher's own two steps where the teacher acted."""
        if batch.actor == STUDENT:
            return super().label_transitions(batch)
        t, _, s = self.table[sent(batch.transition, self.context.device)].unbind(1)
        return pd_target(self.teacher.schedule, batch.z_t, batch.z_s, t, s)


class ProgressiveStage(Stage):
    """Halves the steps of a teacher once. Rollouts use the trained student, not its average."""

    source: MixedSource

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
        """``stage`` is this stage of ``config``. For the other arguments see ``Stage``."""
        super().__init__(teacher, pool, stage.updates, config, accelerator, index, start)
        self.sampling = ddim_sampling(stage.steps)
        grid, teacher_grid = self.schedule.grid(stage.steps), self.schedule.grid(2 * stage.steps)
        steps = segments(teacher_grid, grid)
        self.table = torch.tensor([[t, middle, s] for (t, middle), (_, s) in steps], device=self.device)
        self.times = self.table[:, 0]
        steady_teacher, steady_student = map(self.context.steady, (teacher, GuidedDenoiser(self.student)))
        actors = pair_actors(steady_teacher, steady_student, teacher_grid, grid)
        # The student's step to the end is not taken: no training state lies behind it.
        actors[STUDENT] = replace(actors[STUDENT], steps=[*actors[STUDENT].steps[:-1], []])
        labeler = ProgressiveLabeler(self.context, steady_teacher, self.table)
        collector = MixedCollector(self.context, labeler, self.net, actors)
        self.source = MixedSource(self.context, self.times, stage.updates, labeler, self.schedule.add_noise, collector)

    def _update(self, step: int) -> Logs:
        states, aggregated = self.source.draw(step)
        clipped = ClippedFraction(self.teacher.reflection, len(self.schedule))

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(states)):
                z, t = states.z[rows], self.times[sent(states.transition[rows], self.device)]
                with self.accelerator.autocast():
                    x0 = self.student(z, t, self.condition(states.row[rows]))
                clipped.add(x0, t)
                yield share * pd_loss(x0.float(), states.target[rows], self.schedule.snr(t))

        return self.descend(losses(), step) | clipped.logs() | self.source.logs(aggregated)


def two_step_target(teacher: Denoiser, z: Tensor, t: Tensor, middle: Tensor, s: Tensor, condition: Condition) -> Tensor:
    """Return PD's target x̃ for z [B, …]: the teacher takes two DDIM steps t → middle → s.

    Args:
        teacher: The teacher.
        z: States at t.
        t: [B], where the first step starts.
        middle: [B], where the second step starts.
        s: [B], where the second step ends.
        condition: B rows.
    """
    z_middle, _ = ddim(teacher.schedule, z, t, middle, teacher(z, t, condition))
    z_s, _ = ddim(teacher.schedule, z_middle, middle, s, teacher(z_middle, middle, condition))
    return pd_target(teacher.schedule, z, z_s, t, s)
