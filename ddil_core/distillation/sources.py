"""Where training states come from, the same for every method: forward-diffused data, and with DDIL the aggregated dataset, whose
rollouts are the teacher's and the student's."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor, rollout_latents
from ddil_core.distillation.aggregate import AggregatedDataset, States
from ddil_core.distillation.config import DdilConfig, PhaseConfig
from ddil_core.distillation.loop import Logs, Stateful
from ddil_core.distillation.processes import gather_rows, own_rows
from ddil_core.distillation.sampler import ConsistencySampler, with_noise
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.dropout import evaluating, slices


@dataclass(frozen=True, eq=False)
class TransitionBatch:
    """What an actor did in a transition of the rollouts: from z_t to z_s, both [B, C, H, W]; ``place`` [B] is the index in the
    stage's times at which it starts, ``row`` [B] the pool's, for the caption, and ``guidance`` [B] as in ``States``."""

    actor: str
    place: Tensor
    row: Tensor
    z_t: Tensor
    z_s: Tensor
    guidance: Tensor | None


class SourcedStage(Stage):
    """A stage whose batches are drawn from the three sources in the shares of a phase.

    A method says at which ``times`` [K] its data are diffused to, what the teacher says of a state (``label``), and what rollouts
    collect (``_collect``). ``draws`` is how many batches are drawn in all; phases are shares of it.
    """

    times: Tensor
    draws: int
    dataset: AggregatedDataset | None = None

    def make_dataset(self, *, targets: bool = True, guided: bool = False) -> None:
        """The aggregated dataset, where the run has DDIL."""
        ddil, shape = self.config.ddil, tuple(self.pool.mean.shape[1:])
        if ddil is not None:
            self.dataset = AggregatedDataset(
                ddil.capacity, ddil.uses, shape, self.device, targets=targets, guided=guided
            )

    def stateful(self) -> dict[str, Stateful]:
        parts = super().stateful()
        return parts if self.dataset is None else parts | {"dataset": self.dataset}

    def label(self, z: Tensor, transition: Tensor, row: Tensor, guidance: Tensor | None) -> Tensor:
        """What the teacher says of states at times that differ by row; nothing, [B, 0], in a method that has no targets."""
        return z.new_empty(len(z), 0)

    def target(self, seen: TransitionBatch) -> Tensor:
        """What the teacher says of the state that a transition starts at; what it did itself says it already, in some methods."""
        return self.label(seen.z_t, seen.place, seen.row, seen.guidance)

    def draw_guidance(self, count: int, generator: torch.Generator) -> Tensor | None:
        """The guidance g [B] of states where it differs from state to state."""
        return None

    @abstractmethod
    def _collect(
        self, dataset: AggregatedDataset, ddil: DdilConfig, phase: PhaseConfig, wanted: int, step: int
    ) -> None:
        """Roll out as many trajectories as give ``wanted`` uses; keep the states that they visit, with what the teacher says."""

    def _walk(
        self,
        actors: Mapping[str, Actor],
        strings: Sequence[str],
        z: Tensor,
        told: Condition,
        row: Tensor,
        places: Sequence[int],
        guidance: Tensor | None = None,
    ) -> States:
        """Roll trajectories out from z [B, C, H, W], each process its own; all states that all of them visit, with their targets.

        ``places`` are the indices in ``times`` of the transitions; the other arguments have a row a trajectory.
        """
        steps = range(len(strings[0]))
        visits = [(k, i) for k in steps for actor in actors for i, string in enumerate(strings) if string[k] == actor]
        own = torch.arange(len(strings))[own_rows(self.accelerator, len(strings))]
        kept: list[tuple[Tensor, Tensor]] = []

        def observe(actor: str, transition: int, rows: Tensor, z_t: Tensor, z_s: Tensor) -> None:
            mine = own[rows]
            g = None if guidance is None else guidance[mine]
            place = torch.full_like(mine, places[transition])
            target = self.target(TransitionBatch(actor, place, row[mine], z_t, z_s, g))
            self.finite.see("at states of rollouts", target)
            kept.append((z_t, target))

        there = own.to(z.device)
        with self.accelerator.autocast(), evaluating(self.net):
            rollout_latents(
                dict(actors),
                z[there],
                told.rows(there),
                [{strings[i]} for i in own.tolist()],
                batch_size=self.config.teacher_batch_size,
                observe=observe,
                pad=False,
            )
        transition, trajectory = torch.tensor(visits).unbind(1)
        mine = torch.isin(trajectory, own).nonzero().flatten()  # in the order in which they were kept
        z_t, target = (
            gather_rows(self.accelerator, torch.cat(column), mine.to(z.device), len(visits))
            for column in zip(*kept, strict=True)
        )
        g = None if guidance is None else guidance[trajectory]
        return States(z_t, target, torch.tensor(places)[transition], row[trajectory], g)

    def _draw(self, step: int) -> tuple[States, int]:
        """Forward-diffused data, then aggregated states, in the shares of the phase; and how many of the latter there are."""
        first, end = 0, self.draws
        if self.dataset is None or self.config.ddil is None:
            return self._data(step, first, end, 0.0), 0
        phase, first, end = phase_at(self.config.ddil.phases, step, end)
        count = self.aggregated_count(phase.aggregated, step)
        if self.dataset.pending < count:
            served = range(step, min(step + self.config.ddil.collect_every, end))
            wanted = sum(self.aggregated_count(phase.aggregated, later) for later in served) - self.dataset.pending
            self._collect(self.dataset, self.config.ddil, phase, wanted, step)
        aggregated = States(*self.dataset.take(count))
        if count == self.config.batch_size:
            return aggregated, count
        return States.cat(self._data(step, first, end, phase.aggregated), aggregated), count

    def aggregated_count(self, share: float, step: int) -> int:
        """How many states of an update's batch are aggregated ones; their mean over updates is ``share`` of the batch.

        A number that is not whole is rounded up or down at random, with the probability that keeps the mean. The draw
        depends on the update alone, so that every process knows it, and so does a collection for later updates.
        """
        fewest, most = whole_numbers(share * self.config.batch_size)
        if fewest == most:
            return fewest
        draw = torch.rand((), generator=self.generator(step, 3), dtype=torch.float64)
        return fewest + int(float(draw) < share * self.config.batch_size - fewest)

    def shares(self, aggregated: int) -> Logs:
        """What the log says of a batch's sources, where the run has DDIL."""
        return {} if self.dataset is None else {"aggregated_fraction": aggregated / self.config.batch_size}

    _ahead: list[States]
    _ahead_from = -1

    def _data(self, step: int, first: int, end: int, share: float) -> States:
        """This update's forward-diffused states, of a phase from ``first`` to ``end`` with a ``share`` of aggregated states.

        The teacher labels those of several updates together. Which ones go together depends on the update's number alone, so
        that a resumed run labels the same batch again.
        """
        size = self.config.batch_size
        most = size - whole_numbers(share * size)[0]
        together = max(1, self.config.teacher_batch_size * self.accelerator.num_processes // most)
        start = step - (step - first) % together
        if start != self._ahead_from:
            self._ahead_from = start
            steps = range(start, min(start + together, end))
            counts = [size - self.aggregated_count(share, later) for later in steps]
            self._ahead = self._diffuse(steps, counts).split(counts)
        return self._ahead[step - start]

    def _diffuse(self, steps: Sequence[int], counts: Sequence[int]) -> States:
        """So many forward-diffused states for each of some updates, with the teacher's targets."""
        drawn, told = [], []
        for step, count in zip(steps, counts, strict=True):
            generator = self.generator(step, 0)
            x0, row = self.pool.draw(count, generator)
            transition = torch.randint(len(self.times), (count,), generator=generator)
            drawn.append((x0, row, transition, torch.randn(x0.shape, generator=generator)))
            guidance = self.draw_guidance(count, generator)
            told += [] if guidance is None else [guidance]
        x0, row, transition, eps = (torch.cat(column) for column in zip(*drawn, strict=True))
        g = torch.cat(told) if told else None
        t = self.times[transition.to(self.device)]
        z = self.noised(x0.to(self.device), eps.to(self.device), t)
        own = own_rows(self.accelerator, len(z))
        asked = States(z, z.new_empty(len(z), 0), transition, row, g).part(own)
        parts = [asked.part(rows) for rows in slices(len(asked), self.config.teacher_batch_size)]
        target = torch.cat([self.label(part.z, part.transition, part.row, part.guidance) for part in parts])
        self.finite.see("at states of the data", target)
        return States(z, gather_rows(self.accelerator, target, own, len(z)), transition, row, g)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The states z [B, C, H, W] that data are diffused to at t [B]."""
        return self.schedule.add_noise(x0, eps, t)


class RolloutStage(SourcedStage):
    """A stage whose rollouts have one actor each, from noise to the end: the teacher's, then the student's.

    They differ in length, so their numbers are chosen such that of all states the phase's ``p_teacher`` are the teacher's.
    """

    walkers: Mapping[str, Actor]
    """By actor, whoever rolls out, one state a transition."""
    places: Mapping[str, Sequence[int]]
    """By actor, the indices in ``times`` of its transitions."""

    def tell(self, actor: str, row: Tensor, guidance: Tensor | None) -> Condition:
        """What an actor's network is told."""
        return self.condition(row)

    def _collect(
        self, dataset: AggregatedDataset, ddil: DdilConfig, phase: PhaseConfig, wanted: int, step: int
    ) -> None:
        generator = self.generator(step, 1)
        lengths = {actor: len(self.walkers[actor].steps) for actor in (TEACHER, STUDENT)}
        counts = trajectories(math.ceil(wanted / ddil.uses), phase.p_teacher, lengths, generator)
        places: list[int] = []
        for actor, count in counts.items():
            if count:
                places += dataset.add(self._roll(actor, count, generator))
        dataset.enqueue(places, generator)

    def _roll(self, actor: str, count: int, generator: torch.Generator) -> States:
        """The states of some trajectories of one actor."""
        row = torch.randint(len(self.pool), (count,), generator=generator)
        z = torch.randn((count, *self.pool.mean.shape[1:]), generator=generator).to(self.device)
        guidance = self.draw_guidance(count, generator)
        walker, told = self.walkers[actor], self.tell(actor, row, guidance)
        if isinstance(walker, ConsistencySampler):
            told = with_noise(told, z, torch.ones(len(walker.steps) - 1, count, dtype=torch.bool), generator)
        string = actor * len(walker.steps)
        return self._walk({actor: walker}, [string] * count, z, told, row, self.places[actor], guidance)


def trajectories(
    states: int, p_teacher: float, lengths: Mapping[str, int], generator: torch.Generator
) -> dict[str, int]:
    """How many trajectories of each actor give at least ``states`` states, of which ``p_teacher`` are the teacher's.

    What does not divide is rounded up or down at random, with the probability that keeps the mean.
    """
    counts = dict.fromkeys(lengths, 0)
    while (missing := states - sum(counts[actor] * length for actor, length in lengths.items())) > 0:
        for actor, length in lengths.items():
            share = p_teacher if actor == TEACHER else 1 - p_teacher
            draw = float(torch.rand((), generator=generator, dtype=torch.float64))
            counts[actor] += math.floor(share * missing / length + draw)
    return counts


def whole_numbers(number: float) -> tuple[int, int]:
    """The whole numbers below and above a number; the same one twice where the number is whole, but for the rounding of a share."""
    nearest = round(number)
    if math.isclose(number, nearest, rel_tol=1e-9, abs_tol=1e-9):
        return nearest, nearest
    return math.floor(number), math.ceil(number)


def phase_at(phases: tuple[PhaseConfig, ...], step: int, updates: int) -> tuple[PhaseConfig, int, int]:
    """The phase that an update is in, its first update, and the update at which it ends."""
    first = 0
    for phase in phases:
        end = round(phase.until * updates)
        if step < end:
            return phase, first, end
        first = end
    raise IndexError(f"update {step} is past the stage's {updates}")
