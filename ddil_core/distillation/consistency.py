"""Consistency distillation (LCM: Luo et al., 2310.04378; LCM-LoRA: 2311.05556), and DDIL on it.

On the grid 19, 39, …, 999, or on the even grid of a flow, the guided teacher takes one DDIM step to the next time. The
student's consistency function must have the same value at both ends of the step. Without DDIL every step starts at
forward-diffused data. With DDIL some steps start at states that rollouts of the teacher or of the student visited.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, Denoiser, GuidedDenoiser, NetworkDenoiser, guidance_embedding
from ddil_core.diffusion.few_step import consistency_grid, consistency_value
from ddil_core.diffusion.parameterization import Reflection
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor
from ddil_core.diffusion.schedule import LCM_STEPS, FlowSchedule, Schedule, Time, Transition, transitions
from ddil_core.diffusion.solvers import ddim
from ddil_core.distillation.adapters import require_lora, with_lora
from ddil_core.distillation.checks import require_few_step
from ddil_core.distillation.clipping import ClippedFraction
from ddil_core.distillation.collectors import Labeler, SeparateCollector, SoleActor, TransitionBatch
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.context import StageContext
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.losses import consistency_loss
from ddil_core.distillation.processes import slices
from ddil_core.distillation.run import Run
from ddil_core.distillation.sampler import ConsistencySampler
from ddil_core.distillation.sources import MixedSource
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.start import starting_network
from ddil_core.distillation.student import Student
from ddil_core.distillation.training import train_stage
from ddil_core.distillation.training_log import Logs
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support.devices import sent
from ddil_core.support.errors import WrongCommand


def require_consistency(model: Model, config: ConsistencyConfig) -> None:
    """Refuse a teacher that consistency distillation cannot use.

    Raises:
        DdilError: the method does not know the teacher's network, or what it predicts.
        WrongCommand: the network has no place for the LoRA or for the embedding of the guidance, or the teacher has no
            grid of ``teacher_steps`` steps in which the student's nests.
    """
    require_few_step(model, "consistency distillation")
    require_lora(model, config.lora)
    if config.w_embedding is not None and model.layout.network == "transformer":
        raise WrongCommand(
            f"the teacher {model.reference!r} has a transformer, which has no place for LCM's embedding of the "
            "guidance; say --set w_embedding=null, which builds the guidance of guidance_range into the student"
        )
    schedule = model.denoiser.schedule
    if isinstance(schedule, FlowSchedule):
        _require_nesting(config)
        return
    size = len(schedule)
    if size % config.teacher_steps:
        raise WrongCommand(
            f"teacher_steps must divide the teacher's {size} timesteps, and {config.teacher_steps} does not; choose "
            "another"
        )


def _require_nesting(config: ConsistencyConfig) -> None:
    """Refuse a student whose grid on a flow does not nest in its teacher's.

    Raises:
        WrongCommand: it does not.
    """
    if config.teacher_steps % config.student_steps:
        steps = config.student_steps * max(1, round(config.teacher_steps / config.student_steps))
        raise WrongCommand(
            f"on a flow the student's grid nests in the teacher's where student_steps divides teacher_steps, and "
            f"{config.student_steps} does not divide {config.teacher_steps}; say --set teacher_steps={steps}"
        )


def train_consistency(run: Run[ConsistencyConfig]) -> Student:
    """Train the one stage of the method, which leaves ``checkpoints/consistency.safetensors``."""
    model, config = run.model, run.config
    teacher = GuidedDenoiser(run.frozen(model.denoiser.net), model.nothing(), reflection=run.reflection)
    start = student_network(starting_network(run), config)
    make = partial(ConsistencyStage, teacher, run.pool, config, run.accelerator, start)
    net = train_stage(run, make, start, "consistency", f"LCM{'-LoRA' * (config.lora is not None)}")
    sampling = lcm_sampling(config, model.denoiser.schedule)
    return Student(net, model.denoiser.prediction, sampling, config.lora is not None, config.teacher_steps)


def lcm_sampling(config: ConsistencyConfig, schedule: Schedule) -> Sampling:
    """Return how the student is sampled.

    LCM's own grid of 50 points needs no timesteps, and neither does a flow; every other grid lists them.
    """
    guidance = 1.0 if config.w_embedding is None else config.guidance_scale
    if isinstance(schedule, FlowSchedule):
        return Sampling("lcm", config.student_steps, None, guidance, "even", distilled=True)
    lcm_own = config.teacher_steps == LCM_STEPS
    times = None if lcm_own else tuple(consistency_grid(schedule, config.teacher_steps, config.student_steps))
    return Sampling("lcm", config.student_steps, None, guidance, "lcm", timesteps=times, distilled=True)


def student_network(net: nn.Module, config: ConsistencyConfig) -> nn.Module:
    """Return the teacher's network with a LoRA beside it, or a copy with a projection of the guidance's embedding.

    A student with neither is the network itself.
    """
    if config.lora is not None:
        return with_lora(net, config.lora)
    return net if config.w_embedding is None else with_embedding(net, config.w_embedding)


def with_embedding(net: Any, width: int) -> nn.Module:
    """Return a copy of a U-Net with ``time_cond_proj_dim``.

    The new weights are zero, so that its output stays the same.
    """
    # diffusers lists there what a configuration leaves out, and ignores new values of these keys.
    config = {key: value for key, value in net.config.items() if key != "_use_default_values"}
    wider = type(net).from_config(config | {"time_cond_proj_dim": width})
    weights = net.state_dict() | {
        "time_embedding.cond_proj.weight": torch.zeros_like(wider.time_embedding.cond_proj.weight)
    }
    wider.load_state_dict(weights)
    return wider


class ConsistencyLabeler(Labeler):
    """The target of z_t is z_s: the end of the guided teacher's DDIM step from t to s.

    Every state has its own guidance.
    """

    has_targets = True
    guided = True

    def __init__(
        self, context: StageContext, teacher: Denoiser, table: Tensor, guidance_range: tuple[float, float]
    ) -> None:
        """``table`` [K, 2] holds t and s of every transition."""
        self.context, self.teacher, self.table, self.guidance_range = context, teacher, table, guidance_range

    def draw_guidance(self, count: int, generator: torch.Generator) -> Tensor:
        low, high = self.guidance_range
        return low + (high - low) * torch.rand(count, generator=generator)

    def condition(self, row: Tensor, guidance: Tensor | None) -> Condition:
        """Return the teacher's condition: the captions and the guidance scales."""
        assert guidance is not None
        return replace(self.context.condition(row), guidance=sent(guidance, self.context.device))

    def label(self, z: Tensor, transition: Tensor, row: Tensor, guidance: Tensor | None) -> Tensor:
        t, s = self.table[sent(transition, self.context.device)].unbind(1)
        with torch.no_grad(), self.context.accelerator.autocast():
            x0 = self.teacher(z, t, self.condition(row, guidance))
        return ddim(self.teacher.schedule, z, t, s, x0.float())[0]

    def label_transitions(self, batch: TransitionBatch) -> Tensor:
        """Take the teacher's own step where the teacher acted."""
        return batch.z_s if batch.actor == TEACHER else super().label_transitions(batch)


class ConsistencyStage(Stage):
    """Trains the student's consistency function to be equal at both ends of a transition.

    The target network is the average of the student, or with a LoRA the student itself.
    """

    source: MixedSource
    average_warms_up = False
    evaluates_average = True

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        config: ConsistencyConfig,
        accelerator: Accelerator,
        start: nn.Module,
    ) -> None:
        """``start`` is what ``student_network`` returns. For the other arguments see ``Stage``."""
        super().__init__(teacher, pool, config.updates, config, accelerator, config.method, start)
        self.settings = config
        self.sampling = self.own_sampling()
        pairs = pairs_of(consistency_grid(self.schedule, config.teacher_steps, config.teacher_steps))
        self.table = torch.tensor(pairs, device=self.device)
        self.times = self.table[:, 0]
        self.target_net = type(self.student)(
            self.net if self.ema is None else self.ema.module, self.schedule, self.student.prediction
        )
        self.labeler = ConsistencyLabeler(self.context, self.context.steady(teacher), self.table, config.guidance_range)
        self.student_condition = StudentCondition(self.context, config.w_embedding)
        grid = self.sampling.times(self.schedule)
        steps = [[step] for step in transitions(grid)]
        visited = [index for index, (t, _) in enumerate(pairs) if t in grid]
        every_pair = Actor(self.labeler.teacher, [[pair] for pair in pairs])
        own_solver = self.sampling.own_solver()
        sampler = ConsistencySampler(self.context.steady(self.student), [*steps[:-1], []], own_solver)
        actors = {
            TEACHER: SoleActor(every_pair, range(len(pairs)), self.labeler.condition),
            STUDENT: SoleActor(sampler, visited, self.student_condition),
        }
        collector = SeparateCollector(self.context, self.labeler, self.net, actors)
        self.source = MixedSource(
            self.context, self.times, config.updates, self.labeler, self.schedule.add_noise, collector
        )

    def _update(self, step: int) -> Logs:
        states, aggregated = self.source.draw(step)
        clipped = ClippedFraction(self.teacher.reflection, len(self.schedule))

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(states)):
                t, s = self.table[sent(states.transition[rows], self.device)].unbind(1)
                part = states.part(rows)
                condition = self.student_condition(part.row, part.guidance)
                target = self._target(part.target, s, condition)
                with self.accelerator.autocast():
                    x0 = self.student(part.z, t, condition)
                clipped.add(x0, t)
                value = consistency_value(self.schedule, part.z, t, x0.float())
                yield share * self.loss(value, target, t)

        return self.descend(losses(), step) | clipped.logs() | self.source.logs(aggregated)

    def own_sampling(self) -> Sampling:
        """Return how the student is sampled."""
        return lcm_sampling(self.settings, self.schedule)

    def loss(self, value: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Return the loss between two values [B, C, H, W] of the consistency function from states at t [B]."""
        huber = self.settings.huber_c if self.settings.loss == "huber" else None
        weight = self.schedule.at(t, value)[1].flatten().reciprocal() if self.settings.weighting == "v" else None
        return consistency_loss(value, target.float(), huber, weight)

    @torch.no_grad()
    def _target(self, z: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """Return the target network's consistency function at the ends z [B, C, H, W] of transitions, at s [B]."""
        values = []
        with self.accelerator.autocast(), evaluating(self.target_net):
            for rows in slices(len(z), self.config.teacher_batch_size):
                part = condition.part(rows)
                values.append(consistency(self.target_net, z[rows], s[rows], part, self.teacher.reflection))
        return torch.cat(values)


@dataclass(frozen=True)
class StudentCondition:
    """Makes the student's condition: the captions and an embedding of the guidance, unless its ``width`` is None."""

    context: StageContext
    width: int | None

    def __call__(self, row: Tensor, guidance: Tensor | None) -> Condition:
        condition = self.context.condition(row)
        if self.width is None:
            return condition
        assert guidance is not None
        embedded = guidance_embedding(guidance - 1, self.width)
        return Condition(condition.tensors | {"timestep_cond": sent(embedded, self.context.device)})


def pairs_of(grid: list[Time]) -> list[Transition]:
    """Return LCM's steps t → s on its falling grid.

    The last step ends at time 0. On a diffusion process σ is not 0 there. On a flow that is the clean end.
    """
    return transitions(grid, end=0)


def consistency(
    network: NetworkDenoiser, z: Tensor, t: Tensor, condition: Condition, reflection: Reflection | None
) -> Tensor:
    """Return a network's consistency function with a reflected x̂. It serves as a target, which needs no gradient.

    Args:
        network: The target network.
        z: States [B, C, H, W].
        t: Times [B].
        condition: B rows.
        reflection: Keeps x̂ inside the data's range; None leaves x̂ as it is.
    """
    x0 = network(z, t, condition).float()
    return consistency_value(network.schedule, z, t, x0 if reflection is None else reflection(x0))
