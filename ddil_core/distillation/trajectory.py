"""Trajectory consistency distillation (TCD: Zheng et al., 2402.19159), CTM's condition (2310.02279), and DDIL on it.

The student maps a state at t to any earlier time s on the teacher's trajectory. Its trajectory consistency function is
DDIM's step with the student's own x̂, the exponential integrator of first order: f(z_t, t → s) = α_s x̂ + σ_s ε̂. The
guided teacher takes one DDIM step t → t' on LCM's grid. Both ends of this step must lead to the same state at s:
f(z_t, t → s) = f⁻(z_t', t' → s), where f⁻ is the target network. s is drawn from the grid's times up to t', and from
timestep 0. At s = t' the target is the teacher's state itself, so that no boundary scalings are needed.

TCD's authors tell the network t alone. CTM also tells it s (``condition_on_s``).

The student is sampled with noise of strength γ between its steps (the solver ``tcd``), and so are its rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser
from ddil_core.diffusion.parameterization import FLOWS
from ddil_core.diffusion.schedule import Schedule
from ddil_core.diffusion.solvers import GAMMA, ddim
from ddil_core.distillation.clipping import ClippedFraction
from ddil_core.distillation.consistency import ConsistencyStage, lcm_sampling, require_consistency, student_network
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.context import LOSS
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.processes import slices
from ddil_core.distillation.run import Run
from ddil_core.distillation.start import starting_network
from ddil_core.distillation.student import Student
from ddil_core.distillation.training import train_stage
from ddil_core.distillation.training_log import Logs
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support.devices import sent
from ddil_core.support.errors import DdilError, WrongCommand


class TrajectoryConfig(ConsistencyConfig):
    """Trajectory consistency distillation (TCD).

    Attributes:
        gamma: The strength γ of the noise between the steps in which the student is sampled, and rolled out: 0 is
            none, 1 is LCM's sampling.
        condition_on_s: Tell the network the time s at which its jump ends, as CTM does. The embedding of s starts at
            zero, and stock diffusers pipelines do not give it. A LoRA has no such embedding.
    """

    method: Literal["tcd"] = "tcd"  # type: ignore[assignment]
    gamma: float = Field(default=GAMMA, ge=0, le=1)
    condition_on_s: bool = False

    @model_validator(mode="after")
    def _s_needs_weights(self) -> TrajectoryConfig:
        if self.lora is not None and self.condition_on_s:
            raise ValueError("a LoRA has no embedding of s; leave out condition_on_s, or the LoRA")
        return self


def require_trajectory(model: Model, config: TrajectoryConfig) -> None:
    """Refuse a teacher that trajectory consistency distillation cannot use.

    Raises:
        DdilError: the teacher is a flow, for which diffusers has no scheduler of TCD.
        WrongCommand: its network has no place for a LoRA or for the embedding of s, or it has no such grid.
    """
    if model.denoiser.prediction in FLOWS:
        raise DdilError(
            f"the teacher {model.reference!r} predicts {model.denoiser.prediction}, and trajectory consistency "
            "distillation needs a network that predicts ε, v or x₀; distil a flow by pd, lcm or dmd2"
        )
    require_consistency(model, config)
    net: Any = model.denoiser.net
    if config.condition_on_s and (model.layout.network != "unet" or net.config.get("class_embed_type") is not None):
        raise WrongCommand(
            f"condition_on_s adds an embedding to a U-Net without classes, which {model.reference!r} has not; say "
            "--set condition_on_s=false"
        )


def train_trajectory(run: Run[TrajectoryConfig]) -> Student:
    """Train the one stage of the method, which leaves ``checkpoints/trajectory.safetensors``."""
    model, config = run.model, run.config
    teacher = GuidedDenoiser(run.frozen(model.denoiser.net), model.nothing(), reflection=run.reflection)
    start = trajectory_network(starting_network(run), config)
    make = partial(TrajectoryStage, teacher, run.pool, config, run.accelerator, start)
    net = train_stage(run, make, start, "trajectory", f"TCD{'-LoRA' * (config.lora is not None)}")
    sampling = tcd_sampling(config, model.denoiser.schedule)
    return Student(net, model.denoiser.prediction, sampling, config.lora is not None, config.teacher_steps)


def tcd_sampling(config: TrajectoryConfig, schedule: Schedule) -> Sampling:
    """Return how the student is sampled: at LCM's times, down to timestep 0, with noise of strength γ."""
    return replace(lcm_sampling(config, schedule), solver="tcd", ends_clean=False, gamma=config.gamma)


def trajectory_network(net: nn.Module, config: TrajectoryConfig) -> nn.Module:
    """Return what ``student_network`` returns, with an embedding of s where the student is told s."""
    start = student_network(net, config)
    return with_end(start) if config.condition_on_s else start


def with_end(net: Any) -> nn.Module:
    """Return a copy of a U-Net that is told where its jump ends (``class_embed_type: timestep`` of diffusers).

    The embedding of s is added to that of t. It starts with the first layer of the embedding of t, and with zeros in
    its second layer, so that the output stays the same.
    """
    config = {key: value for key, value in net.config.items() if key != "_use_default_values"}
    wider = type(net).from_config(config | {"class_embed_type": "timestep"})
    first, second = net.time_embedding.linear_1.state_dict(), wider.class_embedding.linear_2.state_dict()
    embedding = {f"class_embedding.linear_1.{name}": tensor for name, tensor in first.items()}
    embedding |= {f"class_embedding.linear_2.{name}": torch.zeros_like(tensor) for name, tensor in second.items()}
    wider.load_state_dict(net.state_dict() | embedding)
    return wider


class TrajectoryStage(ConsistencyStage):
    """Trains the student so that both ends of a teacher's step lead to the same state at s.

    The target network is the average of the student, or with a LoRA the student itself.
    """

    settings: TrajectoryConfig

    def own_sampling(self) -> Sampling:
        return tcd_sampling(self.settings, self.schedule)

    @cached_property
    def ends(self) -> Tensor:
        """The ends of the teacher's steps on the falling grid, int64 [K], on the host."""
        return self.table[:, 1].cpu()

    def _update(self, step: int) -> Logs:
        states, aggregated = self.source.draw(step)
        ends = self.draw_ends(states.transition, step)
        clipped = ClippedFraction(self.teacher.reflection, len(self.schedule))

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(states)):
                t, middle = self.table[sent(states.transition[rows], self.device)].unbind(1)
                part, s = states.part(rows), sent(ends[rows], self.device)
                condition = self.student_condition(part.row, part.guidance)
                if self.settings.condition_on_s:
                    condition = condition.ending_at(s)
                target = self.target_at(part.target, middle, s, condition)
                with self.accelerator.autocast():
                    x0 = self.student(part.z, t, condition)
                clipped.add(x0, t)
                value, _ = ddim(self.schedule, part.z, t, s, x0.float())
                yield share * self.loss(value, target, t)

        return self.descend(losses(), step) | clipped.logs() | self.source.logs(aggregated)

    def draw_ends(self, transition: Tensor, step: int) -> Tensor:
        """Draw s for each state, int64 [B]: uniform over the ends of its own step and of all later ones.

        ``transition`` int64 [B] is the index of the teacher's step that starts at the state.
        """
        later = len(self.ends) - transition
        draw = torch.rand(len(transition), generator=self.generator(step, LOSS), dtype=torch.float64)
        return self.ends[transition + (draw * later).long()]

    @torch.no_grad()
    def target_at(self, z: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """Return the target network's jumps from states z [B, C, H, W] at t [B] to s [B], with a reflected x̂."""
        values = []
        with self.accelerator.autocast(), evaluating(self.target_net):
            for rows in slices(len(z), self.config.teacher_batch_size):
                x0 = self.target_net(z[rows], t[rows], condition.part(rows)).float()
                x0 = x0 if self.teacher.reflection is None else self.teacher.reflection(x0)
                values.append(ddim(self.schedule, z[rows], t[rows], s[rows], x0)[0])
        return torch.cat(values)
