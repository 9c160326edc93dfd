"""Collectors roll trajectories out and label the states that the trajectories visit (DDIL, Algorithm 1)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor, rollout_latents, strings_at
from ddil_core.distillation.aggregate import States
from ddil_core.distillation.context import StageContext
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.processes import gather_rows, own_rows, owners
from ddil_core.distillation.sampler import ConsistencySampler, step_noise
from ddil_core.support.devices import sent


@dataclass(frozen=True, eq=False)
class TransitionBatch:
    """Transitions that one actor took in rollouts.

    Attributes:
        actor: ``TEACHER`` or ``STUDENT``.
        transition: [B], the index in the stage's times at which each transition starts.
        row: [B], the row of the pool that gives the caption.
        z_t: [B, C, H, W], the states before the transitions.
        z_s: [B, C, H, W], the states after the transitions.
        guidance: [B], as in ``States``.
    """

    actor: str
    transition: Tensor
    row: Tensor
    z_t: Tensor
    z_s: Tensor
    guidance: Tensor | None


class Labeler:
    """Computes the targets of states with the teacher. This class serves a method without targets; others extend it.

    Attributes:
        has_targets: Whether states have targets.
        guided: Whether each state has its own guidance scale.
    """

    has_targets = False
    guided = False

    def label(self, z: Tensor, transition: Tensor, row: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the targets of states [B, C, H, W] that start at different transitions; [B, 0] for no targets."""
        return z.new_empty(len(z), 0)

    def label_transitions(self, batch: TransitionBatch) -> Tensor:
        """Return the targets of the states ``z_t``.

        In some methods the teacher's own transition already gives the target.
        """
        return self.label(batch.z_t, batch.transition, batch.row, batch.guidance)

    def draw_guidance(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Draw a guidance scale g for each state [B]; None where all states share one."""
        return None


class Collector(ABC):
    """Rolls trajectories out from noise and yields the states that they visit, with their targets.

    Every process rolls out its own trajectories. All processes get all states.
    """

    def __init__(self, context: StageContext, labeler: Labeler, student: nn.Module) -> None:
        """Connect the collector with its stage.

        Args:
            context: The surroundings of the stage.
            labeler: Gives the states their targets.
            student: The network in training, which is switched to evaluation mode during rollouts.
        """
        self.context, self.labeler, self.student = context, labeler, student

    @abstractmethod
    def collect(self, states: int, p_teacher: float, generator: torch.Generator) -> Iterator[States]:
        """Yield at least ``states`` states from whole trajectories. The teacher acts with probability ``p_teacher``."""

    def roll_out(
        self,
        actors: Mapping[str, Actor],
        strings: Sequence[str],
        z: Tensor,
        told: Callable[[Tensor], Condition],
        row: Tensor,
        transitions: Sequence[int],
        guidance: Tensor | None = None,
    ) -> States:
        """Roll trajectories out and return the states of all processes, in a fixed order.

        Args:
            actors: The actors by their letter in the strings.
            strings: Who acts at each transition, for each trajectory.
            z: [B, C, H, W], the noise at which the trajectories start.
            told: Returns the condition of some trajectories by their numbers. Each process asks for its own.
            row: [B], the row of the pool that gives each caption.
            transitions: The index in the stage's times of each transition of a string.
            guidance: [B], where each trajectory has its own guidance scale.
        """
        accelerator = self.context.accelerator
        steps = range(len(strings[0]))
        visits = [(k, i) for k in steps for actor in actors for i, string in enumerate(strings) if string[k] == actor]
        own = torch.arange(len(strings))[own_rows(accelerator, len(strings))]
        kept: list[tuple[Tensor, Tensor]] = []

        def observe(actor: str, transition: int, rows: Tensor, z_t: Tensor, z_s: Tensor) -> None:
            mine = own[rows]
            scales = None if guidance is None else guidance[mine]
            index = torch.full_like(mine, transitions[transition])
            target = self.labeler.label_transitions(TransitionBatch(actor, index, row[mine], z_t, z_s, scales))
            self.context.finite.see("at states of rollouts", target)
            kept.append((z_t, target))

        own_on_device = sent(own, z.device)
        with accelerator.autocast(), evaluating(self.student):
            rollout_latents(
                dict(actors),
                z[own_on_device],
                told(own),
                [{strings[i]} for i in own.tolist()],
                batch_size=self.context.config.teacher_batch_size,
                observe=observe,
                pad=False,
            )
        transition, trajectory = torch.tensor(visits).unbind(1)  # in the order in which ``observe`` kept its own
        owner = owners(accelerator, len(strings))[trajectory]
        z_t, target = (gather_rows(accelerator, torch.cat(column), owner) for column in zip(*kept, strict=True))
        scales = None if guidance is None else guidance[trajectory]
        return States(z_t, target, torch.tensor(transitions)[transition], row[trajectory], scales)


class MixedCollector(Collector):
    """Teacher and student share every trajectory: at each transition, chance decides who acts (Algorithm 1)."""

    def __init__(
        self, context: StageContext, labeler: Labeler, student: nn.Module, actors: Mapping[str, Actor]
    ) -> None:
        """``actors`` are a teacher and a student with the same transitions, which are the stage's times in order."""
        super().__init__(context, labeler, student)
        self.actors = actors

    def collect(self, states: int, p_teacher: float, generator: torch.Generator) -> Iterator[States]:
        steps = len(self.actors[STUDENT].steps)
        count = math.ceil(states / steps)
        row = self.context.rows(count, generator)
        z = sent(self.context.noise(count, generator), self.context.device)
        strings = strings_at(p_teacher, torch.rand(count, steps, generator=generator, dtype=torch.float64))
        yield self.roll_out(self.actors, strings, z, lambda own: self.context.condition(row[own]), row, range(steps))


@dataclass(frozen=True)
class SoleActor:
    """An actor that takes all transitions of its trajectories.

    Attributes:
        actor: What acts.
        transitions: The index in the stage's times of each of its transitions.
        condition: Returns the actor's condition for rows [B] of the pool and their guidance [B]; None for the captions
            alone.
    """

    actor: Actor
    transitions: Sequence[int]
    condition: Callable[[Tensor, Tensor | None], Condition] | None = None


class SeparateCollector(Collector):
    """Every trajectory has one actor, the teacher or the student.

    Trajectories of the two differ in length. Their numbers are chosen so that the teacher visits the share
    ``p_teacher`` of all states.
    """

    def __init__(
        self, context: StageContext, labeler: Labeler, student: nn.Module, actors: Mapping[str, SoleActor]
    ) -> None:
        super().__init__(context, labeler, student)
        self.actors = actors

    def collect(self, states: int, p_teacher: float, generator: torch.Generator) -> Iterator[States]:
        lengths = {name: len(self.actors[name].actor.steps) for name in (TEACHER, STUDENT)}
        for name, count in trajectories(states, p_teacher, lengths, generator).items():
            if count:
                yield self._collect_from(name, count, generator)

    def _collect_from(self, name: str, count: int, generator: torch.Generator) -> States:
        """Return the states of ``count`` trajectories of one actor."""
        row = self.context.rows(count, generator)
        z = sent(self.context.noise(count, generator), self.context.device)
        guidance = self.labeler.draw_guidance(count, generator)
        sole = self.actors[name]
        actor, noise = sole.actor, None
        if isinstance(actor, ConsistencySampler):
            noise = step_noise(z, torch.ones(len(actor.steps) - 1, count, dtype=torch.bool), generator)

        def told(own: Tensor) -> Condition:
            scales = None if guidance is None else guidance[own]
            condition = self.context.condition(row[own]) if sole.condition is None else sole.condition(row[own], scales)
            return condition if noise is None else replace(condition, noise=sent(noise[own], z.device))

        strings = [name * len(actor.steps)] * count
        return self.roll_out({name: actor}, strings, z, told, row, sole.transitions, guidance)


def trajectories(
    states: int, p_teacher: float, lengths: Mapping[str, int], generator: torch.Generator
) -> dict[str, int]:
    """Return the number of trajectories of each actor.

    Together they visit at least ``states`` states. The teacher visits the share ``p_teacher`` of them on the
    mean: a number that is not whole is rounded up or down at random, with the probability that keeps the mean.
    """
    counts = dict.fromkeys(lengths, 0)
    while (missing := states - sum(counts[actor] * length for actor, length in lengths.items())) > 0:
        for actor, length in lengths.items():
            share = p_teacher if actor == TEACHER else 1 - p_teacher
            draw = float(torch.rand((), generator=generator, dtype=torch.float64))
            counts[actor] += math.floor(share * missing / length + draw)
    return counts
