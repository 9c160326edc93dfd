"""Consistency distillation (LCM: Luo et al., 2310.04378; LCM-LoRA: 2311.05556), and DDIL on it.

On the grid 19, 39, …, 999 (``teacher_steps`` points of it) the guided teacher takes one DDIM step t → t − 20 and the student's
consistency function must not change on it. Without DDIL the step starts at forward-diffused data; with it, a part starts where
rollouts have been: the teacher's, whose every step is such a pair already, or the student's own sampling.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, NetworkDenoiser, guidance_embedding
from ddil_core.diffusion.parameterization import FLOWS, Reflection, boundary_scalings
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor
from ddil_core.diffusion.schedule import LCM_STEPS, Schedule, lcm_grid, transitions
from ddil_core.diffusion.solvers import ddim
from ddil_core.distillation.aggregate import States
from ddil_core.distillation.clipping import Clipped
from ddil_core.distillation.config import ConsistencyConfig, LoraConfig
from ddil_core.distillation.loop import Logs
from ddil_core.distillation.losses import consistency_loss
from ddil_core.distillation.run import Run
from ddil_core.distillation.sampler import ConsistencySampler
from ddil_core.distillation.sources import RolloutStage, TransitionBatch
from ddil_core.distillation.student import Student
from ddil_core.distillation.training import train_stage
from ddil_core.distillation.dropout import evaluating, slices
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import DdilError, WrongCommand

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The layers of a U-Net that LCM-LoRA adapts (diffusers, examples/consistency_distillation)."""


def require_consistency(model: Model, config: ConsistencyConfig) -> None:
    """Raises DdilError or WrongCommand: the teacher is a flow or no U-Net, or has no grid of ``teacher_steps``."""
    require_unet(model, "consistency distillation")
    size = len(model.denoiser.schedule)
    if size % config.teacher_steps:
        raise WrongCommand(
            f"teacher_steps divides the teacher's {size} timesteps, which {config.teacher_steps} does not"
        )


def require_unet(model: Model, what: str) -> None:
    if model.denoiser.prediction in FLOWS or model.layout.network != "unet":
        raise DdilError(
            f"the teacher {model.reference!r} predicts {model.denoiser.prediction} with a {model.layout.network}, and {what} "
            "needs a U-Net that predicts ε, v or x₀; distil another teacher"
        )


def train_consistency(run: Run[ConsistencyConfig]) -> Student:
    """One stage, which leaves ``checkpoints/consistency.safetensors``."""
    model, config = run.model, run.config
    teacher = GuidedDenoiser(run.frozen(model.denoiser.net), model.nothing(), reflection=run.reflection)
    start = student_network(model.denoiser.net, config)
    make = partial(ConsistencyStage, teacher, run.pool, config, run.accelerator, start)
    net = train_stage(run, make, start, "consistency", f"LCM{'-LoRA' * (config.lora is not None)}")
    sampling = lcm_sampling(config, model.denoiser.schedule)
    return Student(net, model.denoiser.prediction, sampling, config.lora is not None, config.teacher_steps)


def lcm_sampling(config: ConsistencyConfig, schedule: Schedule) -> Sampling:
    """On LCM's own grid of 50 points by its name, on another by its timesteps."""
    guidance = 1.0 if config.lora is not None else config.guidance_scale
    own = config.teacher_steps == LCM_STEPS
    times = None if own else tuple(lcm_grid(schedule, config.teacher_steps, config.student_steps))
    return Sampling("lcm", config.student_steps, None, guidance, "lcm", timesteps=times, distilled=True)


def student_network(net: nn.Module, config: ConsistencyConfig) -> nn.Module:
    """The teacher's network as a student's: with a projection of the guidance's embedding, which starts at zero, or with a LoRA."""
    return with_lora(net, config.lora) if config.lora is not None else with_embedding(net, config.w_embedding or 256)


def with_embedding(net: Any, width: int) -> nn.Module:
    """A copy of a U-Net with ``time_cond_proj_dim``. What it is told there makes no difference until it is trained."""
    wider = type(net).from_config(dict(net.config) | {"time_cond_proj_dim": width})
    weights = net.state_dict() | {
        "time_embedding.cond_proj.weight": torch.zeros_like(wider.time_embedding.cond_proj.weight)
    }
    wider.load_state_dict(weights)
    return wider.to(next(net.parameters()).device)


def with_lora(net: nn.Module, lora: LoraConfig) -> nn.Module:
    """A copy of a network with adapters that start at zero; their first weights are the same in every run."""
    import peft

    adapted: Any = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        told = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(LORA_TARGETS))
        adapted.add_adapter(told)
    return adapted


class ConsistencyStage(RolloutStage):
    """The student, its target (the average of its weights, or with a LoRA itself), and pairs (z_t, z_s) to learn from."""

    average_warms_up = False

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        config: ConsistencyConfig,
        accelerator: Accelerator,
        start: nn.Module,
    ) -> None:
        super().__init__(teacher, pool, config.updates, config, accelerator, "lcm", start)
        self.settings, self.draws = config, config.updates
        self.sampling = lcm_sampling(config, self.schedule)
        pairs = pairs_of(lcm_grid(self.schedule, config.teacher_steps, config.teacher_steps))
        self.table = torch.tensor(pairs, device=self.device)
        self.times = self.table[:, 0]
        self.target_net = type(self.student)(
            self.net if self.ema is None else self.ema.module, self.schedule, self.student.prediction
        )
        walk = self.sampling.times(self.schedule)
        self.places = {
            TEACHER: range(len(pairs)),
            STUDENT: [index for index, (t, _) in enumerate(pairs) if t in walk],
        }
        steps = [[step] for step in transitions(walk)]
        self.walkers = {
            TEACHER: Actor(teacher, [[pair] for pair in pairs]),
            STUDENT: ConsistencySampler(self.student, [*steps[:-1], []]),
        }
        self.make_dataset(guided=True)

    def draw_guidance(self, count: int, generator: torch.Generator) -> Tensor:
        low, high = self.settings.guidance_range
        return low + (high - low) * torch.rand(count, generator=generator)

    def _update(self, step: int) -> Logs:
        """One optimiser step; returns tensors that need no synchronisation until they are read."""
        states, aggregated = self._draw(step)
        clipped = Clipped(self.teacher.reflection, len(self.schedule))

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(states)):
                t, s = self.table[states.transition[rows].to(self.device)].unbind(1)
                assert states.guidance is not None
                told = self.tell(STUDENT, states.row[rows], states.guidance[rows])
                target = self._consistent(states.part(rows), s)
                with self.accelerator.autocast():
                    x0 = self.student(states.z[rows], t, told)
                clipped.see(x0, t)
                value = boundary(x0.float(), states.z[rows], t, self.schedule.timestep_scaling)
                huber = self.settings.huber_c if self.settings.loss == "huber" else None
                weight = (
                    self.schedule.at(t, value)[1].flatten().reciprocal() if self.settings.weighting == "v" else None
                )
                yield share * consistency_loss(value, target.float(), huber, weight)

        return self.descend(losses(), step) | clipped.logs() | self.shares(aggregated)

    @torch.no_grad()
    def _consistent(self, states: States, s: Tensor) -> Tensor:
        """What the target network says of the pairs' ends z_s at s [B], for at most ``teacher_batch_size`` states at once."""
        said = []
        with self.accelerator.autocast(), evaluating(self.target_net):
            for rows in slices(len(states), self.config.teacher_batch_size):
                part = states.part(rows)
                told = self.tell(STUDENT, part.row, part.guidance)
                said.append(consistency(self.target_net, part.target, s[rows], told, self.teacher.reflection))
        return torch.cat(said)

    def tell(self, actor: str, row: Tensor, guidance: Tensor | None) -> Condition:
        """The teacher is guided by it, the student is told it through the embedding, or, with a LoRA, not at all."""
        condition = self.condition(row)
        assert guidance is not None
        if actor == TEACHER:
            return replace(condition, guidance=guidance.to(self.device))
        if self.settings.w_embedding is None:
            return condition
        embedded = guidance_embedding(guidance - 1, self.settings.w_embedding)
        return Condition(condition.tensors | {"timestep_cond": embedded.to(self.device)})

    def label(self, z: Tensor, transition: Tensor, row: Tensor, guidance: Tensor | None) -> Tensor:
        """z_s: the guided teacher's one DDIM step from z_t."""
        t, s = self.table[transition.to(self.device)].unbind(1)
        with torch.no_grad(), self.accelerator.autocast():
            x0 = self.teacher(z, t, self.tell(TEACHER, row, guidance))
        return ddim(self.schedule, z, t, s, x0.float())[0]

    def target(self, seen: TransitionBatch) -> Tensor:
        """The teacher's own step is the pair; from where the student has been, the teacher takes its step."""
        return seen.z_s if seen.actor == TEACHER else super().target(seen)


def pairs_of(grid: list[Any]) -> list[tuple[int, int]]:
    """LCM's steps t → s on its falling grid; the last ends at timestep 0 (ᾱ₀, whose σ is not 0) and not clean."""
    return [(int(t), int(s)) for t, s in transitions(grid, end=0)]


def boundary(x0: Tensor, z: Tensor, t: Tensor, scaling: float) -> Tensor:
    """The consistency function c_skip z + c_out x̂, which at t = 0 is z itself; ``scaling`` is the schedule's for timesteps."""
    c_skip, c_out = boundary_scalings(t, z, scaling)
    return c_skip * z + c_out * x0


def consistency(
    network: NetworkDenoiser, z: Tensor, t: Tensor, condition: Condition, reflection: Reflection | None
) -> Tensor:
    """The consistency function of a network, its x̂ reflected: a target, so that no gradient is lost on it."""
    x0 = network(z, t, condition).float()
    return boundary(x0 if reflection is None else reflection(x0), z, t, network.schedule.timestep_scaling)
