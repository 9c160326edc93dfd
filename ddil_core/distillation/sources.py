"""Sources of training states.

The states are forward-diffused data and, with DDIL, states that rollouts visited. Or they are the ends of the student's
own rollouts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddil_core.distillation.aggregate import AggregatedDataset, States
from ddil_core.distillation.checkpoints import Stateful
from ddil_core.distillation.collectors import Collector, Labeler
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.context import COLLECTION, DATA, ROUNDING, StageContext, stage_generator
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.phases import PhaseConfig, curve_bounds, curve_mean
from ddil_core.distillation.processes import gather_rows, own_rows, owners, slices
from ddil_core.distillation.sampler import ConsistencySampler, step_noise
from ddil_core.distillation.training_log import Logs
from ddil_core.distillation.transfer import Ahead, Draws
from ddil_core.support.devices import pinned, sent

Diffuse = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``diffuse(x0, eps, t)`` returns z_t [B, C, H, W]."""


class StateSource(ABC):
    """Gives a stage the states of each batch. A batch has the same states in every process."""

    @abstractmethod
    def draw(self, batch: int) -> tuple[States, int]:
        """Return the states of batch ``batch``, and how many of them come from the aggregated dataset."""

    def stateful(self) -> dict[str, Stateful]:
        """Return what a checkpoint of the source holds."""
        return {}

    def logs(self, aggregated: int) -> Logs:
        """Return what the log says of a batch with ``aggregated`` states from the aggregated dataset."""
        return {}


class Group(NamedTuple):
    """Batches whose data the teacher labels together.

    Attributes:
        start: The first batch.
        counts: How many forward-diffused states each batch has.
    """

    start: int
    counts: list[int]


class MixedSource(StateSource):
    """Draws forward-diffused data and, with DDIL, states of the aggregated dataset, in the shares of the current phase.

    The teacher labels the data of several batches together, so that its own batches are full.
    """

    def __init__(
        self,
        context: StageContext,
        times: Tensor,
        draws: int,
        labeler: Labeler,
        diffuse: Diffuse,
        collector: Collector | None = None,
    ) -> None:
        """Set the source up, with an empty aggregated dataset.

        Args:
            context: The surroundings of the stage.
            times: [K], the timesteps at which transitions start.
            draws: How many batches the stage draws in all. Phases are shares of this number.
            labeler: Gives the data their targets.
            diffuse: Diffuses data forward.
            collector: Fills the aggregated dataset. Without a collector or a ``ddil`` section, all states are data.
        """
        self.context, self.times, self.draws = context, times, draws
        self.labeler, self.diffuse, self.collector = labeler, diffuse, collector
        self.dataset: AggregatedDataset | None = None
        ddil = context.config.ddil
        if ddil is not None and collector is not None:
            shape = tuple(context.pool.mean.shape[1:])
            kinds = {"targets": labeler.has_targets, "guided": labeler.guided}
            self.dataset = AggregatedDataset(ddil.capacity, ddil.uses, shape, context.device, **kinds)
        self.ahead = Ahead(self._drawn, context.device)
        self._labeled: list[States] = []
        self._labeled_from = -1

    def stateful(self) -> dict[str, Stateful]:
        return {} if self.dataset is None else {"dataset": self.dataset}

    def logs(self, aggregated: int) -> Logs:
        return {} if self.dataset is None else {"aggregated_fraction": aggregated / self.context.config.batch_size}

    def draw(self, batch: int) -> tuple[States, int]:
        config = self.context.config
        self.context.batch = batch
        if self.dataset is None or config.ddil is None:
            return self._data(batch), 0
        p_teacher, count, uses = aggregated_uses(config, self.context.index, self.draws, batch, self.dataset.pending)
        if uses:
            self.collect(p_teacher, uses, batch)
        aggregated = States(*self.dataset.take(count))
        if count == config.batch_size:
            return aggregated, count
        return States.cat(self._data(batch), aggregated), count

    def collect(self, p_teacher: float, uses: int, batch: int) -> None:
        """Add states to the aggregated dataset until it can serve ``uses`` more uses.

        The teacher acts with probability ``p_teacher``.
        """
        assert self.dataset is not None and self.collector is not None
        generator = self.context.generator(batch, COLLECTION)
        places: list[int] = []
        with self.context.whole():
            for states in self.collector.collect(math.ceil(uses / self.dataset.uses), p_teacher, generator):
                places += self.dataset.add(states)
        self.dataset.enqueue(places, generator)

    def aggregated_count(self, share: float, batch: int) -> int:
        """Return how many states of batch ``batch`` are aggregated ones (see ``aggregated_rows``)."""
        return aggregated_rows(self.context.config, self.context.index, share, batch)

    def _data(self, batch: int) -> States:
        """Return the forward-diffused states of a batch.

        Which batches the teacher labels together depends on ``batch`` alone. A resumed run labels the same batches
        together.
        """
        group = self._group(batch)
        if group.start != self._labeled_from:
            then = group.start + len(group.counts)
            drawn = self.ahead.take(group.start, then if then < self.draws else None)
            self._labeled_from, self._labeled = group.start, self._diffused(drawn).split(group.counts)
        return self._labeled[batch - group.start]

    def _group(self, batch: int) -> Group:
        """Return the group of batches with batch ``batch`` that the teacher labels together. They lie in one phase."""
        size, ddil = self.context.config.batch_size, self.context.config.ddil
        first, end, most = 0, self.draws, size
        phase: PhaseConfig | None = None
        if self.dataset is not None and ddil is not None:
            phase, first, end = phase_at(ddil.phases, batch, self.draws)
            most = size - whole_numbers(curve_bounds(phase.aggregated)[0] * size)[0]
        room = self.context.config.teacher_batch_size * self.context.accelerator.num_processes
        together = max(1, room // max(1, most))
        start = batch - (batch - first) % together
        batches = range(start, min(start + together, end))
        shares = [0.0 if phase is None else curve_mean(phase.aggregated, [each], first, end) for each in batches]
        return Group(start, [size - self.aggregated_count(*place) for place in zip(shares, batches, strict=True)])

    def _drawn(self, start: int) -> Draws:
        """Draw data, times and noise for the group of batches that begins at ``start``."""
        drawn = []
        for batch, count in enumerate(self._group(start).counts, start):
            generator = self.context.generator(batch, DATA)
            x0, row = self.context.pool.draw(count, generator, batch)
            transition = torch.randint(len(self.times), (count,), generator=generator)
            eps = torch.randn(x0.shape, generator=generator)
            drawn.append((x0, row, transition, eps, self.labeler.draw_guidance(count, generator)))
        *columns, scales = zip(*drawn, strict=True)
        guided = [scale for scale in scales if scale is not None]
        device = self.context.device
        x0, row, transition, eps = (torch.cat(column) for column in columns)
        return Draws(pinned(x0, device), row, transition, pinned(eps, device), torch.cat(guided) if guided else None)

    def _diffused(self, drawn: Draws) -> States:
        """Return forward-diffused states with their targets."""
        device, accelerator = self.context.device, self.context.accelerator
        z = self.diffuse(sent(drawn.x0, device), sent(drawn.eps, device), self.times[sent(drawn.time, device)])
        own = own_rows(accelerator, len(z))
        unlabeled = States(z, z.new_empty(len(z), 0), drawn.time, drawn.row, drawn.guidance).part(own)
        parts = [unlabeled.part(rows) for rows in slices(len(unlabeled), self.context.config.teacher_batch_size)]
        with self.context.whole() if self.labeler.has_targets else nullcontext():
            labels = [self.labeler.label(part.z, part.transition, part.row, part.guidance) for part in parts]
        target = torch.cat(labels)
        self.context.finite.see("at states of the data", target)
        whole = gather_rows(accelerator, target, owners(accelerator, len(z)))
        return States(z, whole, drawn.time, drawn.row, drawn.guidance)


class Start(NamedTuple):
    """Where rollouts of a batch start, drawn on the host.

    Attributes:
        row: Rows of the pool, int64 [B].
        exits: The step before which each rollout stops, int64 [B].
        z: Noise [B, C, H, W].
        noise: The noise of the steps, [B, K, C, H, W].
    """

    row: Tensor
    exits: Tensor
    z: Tensor
    noise: Tensor


class BackwardSimulation(StateSource):
    """Rolls every row out from noise, as the generator samples, to a random step of its own."""

    def __init__(
        self, context: StageContext, times: Tensor, draws: int, sampler: ConsistencySampler, student: nn.Module
    ) -> None:
        """Set the simulation up.

        Args:
            context: The surroundings of the stage.
            times: [K], the generator's timesteps.
            draws: How many batches the stage draws in all.
            sampler: Takes the generator's steps.
            student: The network of the generator, which is switched to evaluation mode during rollouts.
        """
        self.context, self.times, self.draws, self.sampler, self.student = context, times, draws, sampler, student
        self.ahead = Ahead(self._drawn, context.device)

    def _drawn(self, batch: int) -> Start:
        """Draw where the rollouts of a batch start, and where they stop."""
        context, size = self.context, self.context.config.batch_size
        generator = context.generator(batch, DATA)
        row = context.pool.rows(size, generator, batch)
        exits = torch.randint(len(self.times), (size,), generator=generator)
        z = context.noise(size, generator)
        noise = step_noise(z, exits > torch.arange(len(self.times) - 1)[:, None], generator)
        return Start(row, exits, pinned(z, context.device), pinned(noise, context.device))

    @torch.no_grad()
    def draw(self, batch: int) -> tuple[States, int]:
        context, size = self.context, self.context.config.batch_size
        row, exits, z, noise = self.ahead.take(batch, batch + 1 if batch + 1 < self.draws else None)
        z = sent(z, context.device)
        condition = replace(context.condition(row), noise=sent(noise, context.device))
        rows = own_rows(context.accelerator, size)
        own = torch.arange(size)[rows]
        with context.whole(), context.accelerator.autocast(), evaluating(self.student):
            for place in range(len(self.times) - 1):
                moving = sent(own[exits[own] > place], context.device)
                for part in moving.split(context.config.teacher_batch_size):
                    if len(part):
                        z[part] = self.sampler.act(place, z[part], condition.rows(part))
        z = gather_rows(context.accelerator, z[rows], owners(context.accelerator, size))
        return States(z, z.new_empty(size, 0), exits, row), 0


def aggregated_rows(config: MethodConfig, index: int | str, share: float, batch: int) -> int:
    """Return how many states of a batch are aggregated ones. The mean over batches is ``share`` of the batch.

    A number that is not whole is rounded up or down at random, with the probability that keeps the mean. The draw
    depends on ``batch`` alone, so that every process knows it, and so does a collection for later batches.

    Args:
        config: The configuration of the method.
        index: The number or name of the stage.
        share: The share of aggregated states.
        batch: The number of the batch.
    """
    fewest, most = whole_numbers(share * config.batch_size)
    if fewest == most:
        return fewest
    generator = stage_generator(config.seed, index, batch, ROUNDING)
    draw = torch.rand((), generator=generator, dtype=torch.float64)
    return fewest + int(float(draw) < share * config.batch_size - fewest)


def aggregated_uses(
    config: MethodConfig, index: int | str, draws: int, batch: int, pending: int
) -> tuple[float, int, int]:
    """Return ``p_teacher`` at batch ``batch``, how many aggregated states it takes, and what must be collected before.

    The last number counts uses of states. It is 0 where the ``pending`` uses of the aggregated dataset are enough.
    Otherwise it serves ``ddil.collect_every`` batches of the phase, and ``p_teacher`` is the mean over these. For the
    other arguments see ``aggregated_rows`` and ``MixedSource``.
    """
    assert config.ddil is not None
    phase, first, end = phase_at(config.ddil.phases, batch, draws)

    def rows(batch: int) -> int:
        return aggregated_rows(config, index, curve_mean(phase.aggregated, [batch], first, end), batch)

    count = rows(batch)
    served = range(batch, min(batch + config.ddil.collect_every, end))
    p_teacher = curve_mean(phase.p_teacher, served, first, end)
    return p_teacher, count, 0 if pending >= count else sum(map(rows, served)) - pending


def whole_numbers(number: float) -> tuple[int, int]:
    """Return the whole numbers below and above ``number``;

    the same one twice where ``number`` is whole within rounding.
    """
    nearest = round(number)
    if math.isclose(number, nearest, rel_tol=1e-9, abs_tol=1e-9):
        return nearest, nearest
    return math.floor(number), math.ceil(number)


def phase_at(phases: tuple[PhaseConfig, ...], batch: int, draws: int) -> tuple[PhaseConfig, int, int]:
    """Return the phase of batch ``batch``, its first batch, and the batch at which it ends.

    Raises:
        IndexError: the stage has only ``draws`` batches.
    """
    first = 0
    for phase in phases:
        end = round(phase.until * draws)
        if batch < end:
            return phase, first, end
        first = end
    raise IndexError(f"batch {batch} is past the stage's {draws}")
