"""Sources of training states.

The states are forward-diffused data and, with DDIL, states that rollouts visited. Or they are the ends of the student's
own rollouts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ddil_core.distillation.aggregate import AggregatedDataset, States
from ddil_core.distillation.collectors import Collector, Labeler
from ddil_core.distillation.context import COLLECTION, DATA, ROUNDING, StageContext
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.loop import Logs, Stateful
from ddil_core.distillation.phases import PhaseConfig
from ddil_core.distillation.processes import gather_rows, own_rows, slices
from ddil_core.distillation.sampler import ConsistencySampler, with_noise

Diffuse = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``diffuse(x0, eps, t)`` returns z_t [B, C, H, W]."""


class StateSource(ABC):
    """Gives a stage the states of each batch. A batch has the same states in every process."""

    @abstractmethod
    def draw(self, step: int) -> tuple[States, int]:
        """Return the states of batch ``step``, and how many of them come from the aggregated dataset."""

    def stateful(self) -> dict[str, Stateful]:
        """Return what a checkpoint of the source holds."""
        return {}

    def logs(self, aggregated: int) -> Logs:
        """Return what the log says of a batch with ``aggregated`` states from the aggregated dataset."""
        return {}


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
        self._labeled: list[States] = []
        self._labeled_from = -1

    def stateful(self) -> dict[str, Stateful]:
        return {} if self.dataset is None else {"dataset": self.dataset}

    def logs(self, aggregated: int) -> Logs:
        return {} if self.dataset is None else {"aggregated_fraction": aggregated / self.context.config.batch_size}

    def draw(self, step: int) -> tuple[States, int]:
        config = self.context.config
        if self.dataset is None or config.ddil is None:
            return self._data(step, 0, self.draws, 0.0), 0
        phase, first, end = phase_at(config.ddil.phases, step, self.draws)
        count = self.aggregated_count(phase.aggregated, step)
        if self.dataset.pending < count:
            served = range(step, min(step + config.ddil.collect_every, end))
            uses = sum(self.aggregated_count(phase.aggregated, later) for later in served) - self.dataset.pending
            self.collect(phase, uses, step)
        aggregated = States(*self.dataset.take(count))
        if count == config.batch_size:
            return aggregated, count
        return States.cat(self._data(step, first, end, phase.aggregated), aggregated), count

    def collect(self, phase: PhaseConfig, uses: int, step: int) -> None:
        """Add states to the aggregated dataset until it can serve ``uses`` more uses."""
        assert self.dataset is not None and self.collector is not None
        generator = self.context.generator(step, COLLECTION)
        places: list[int] = []
        for states in self.collector.collect(math.ceil(uses / self.dataset.uses), phase.p_teacher, generator):
            places += self.dataset.add(states)
        self.dataset.enqueue(places, generator)

    def aggregated_count(self, share: float, step: int) -> int:
        """Return how many states of a batch are aggregated ones. The mean over batches is ``share`` of the batch.

        A number that is not whole is rounded up or down at random, with the probability that keeps the mean. The draw
        depends on ``step`` alone, so that every process knows it, and so does a collection for later batches.
        """
        size = self.context.config.batch_size
        fewest, most = whole_numbers(share * size)
        if fewest == most:
            return fewest
        draw = torch.rand((), generator=self.context.generator(step, ROUNDING), dtype=torch.float64)
        return fewest + int(float(draw) < share * size - fewest)

    def _data(self, step: int, first: int, end: int, share: float) -> States:
        """Return the forward-diffused states of a batch, in a phase from batch ``first`` to ``end``.

        Which batches the teacher labels together depends on ``step`` alone. A resumed run labels the same batches
        together.
        """
        size = self.context.config.batch_size
        most = size - whole_numbers(share * size)[0]
        room = self.context.config.teacher_batch_size * self.context.accelerator.num_processes
        together = max(1, room // most)
        start = step - (step - first) % together
        if start != self._labeled_from:
            self._labeled_from = start
            steps = range(start, min(start + together, end))
            counts = [size - self.aggregated_count(share, later) for later in steps]
            self._labeled = self._diffused(steps, counts).split(counts)
        return self._labeled[step - start]

    def _diffused(self, steps: Sequence[int], counts: Sequence[int]) -> States:
        """Return forward-diffused states with their targets: for each of ``steps`` as many as ``counts`` says."""
        drawn, scales = [], []
        for step, count in zip(steps, counts, strict=True):
            generator = self.context.generator(step, DATA)
            x0, row = self.context.pool.draw(count, generator)
            transition = torch.randint(len(self.times), (count,), generator=generator)
            drawn.append((x0, row, transition, torch.randn(x0.shape, generator=generator)))
            scale = self.labeler.draw_guidance(count, generator)
            scales += [] if scale is None else [scale]
        x0, row, transition, eps = (torch.cat(column) for column in zip(*drawn, strict=True))
        guidance = torch.cat(scales) if scales else None
        device, accelerator = self.context.device, self.context.accelerator
        z = self.diffuse(x0.to(device), eps.to(device), self.times[transition.to(device)])
        own = own_rows(accelerator, len(z))
        unlabeled = States(z, z.new_empty(len(z), 0), transition, row, guidance).part(own)
        parts = [unlabeled.part(rows) for rows in slices(len(unlabeled), self.context.config.teacher_batch_size)]
        labels = [self.labeler.label(part.z, part.transition, part.row, part.guidance) for part in parts]
        target = torch.cat(labels)
        self.context.finite.see("at states of the data", target)
        return States(z, gather_rows(accelerator, target, own, len(z)), transition, row, guidance)


class BackwardSimulation(StateSource):
    """Rolls every row out from noise, as the generator samples, to a random step of its own."""

    def __init__(self, context: StageContext, times: Tensor, sampler: ConsistencySampler, student: nn.Module) -> None:
        """Set the simulation up.

        Args:
            context: The surroundings of the stage.
            times: [K], the generator's timesteps.
            sampler: Takes the generator's steps.
            student: The network of the generator, which is switched to evaluation mode during rollouts.
        """
        self.context, self.times, self.sampler, self.student = context, times, sampler, student

    @torch.no_grad()
    def draw(self, step: int) -> tuple[States, int]:
        context, size = self.context, self.context.config.batch_size
        generator = context.generator(step, DATA)
        row = torch.randint(len(context.pool), (size,), generator=generator)
        exits = torch.randint(len(self.times), (size,), generator=generator)
        z = context.noise(size, generator)
        steps = torch.arange(len(self.times) - 1)
        condition = with_noise(context.condition(row), z, exits > steps[:, None], generator)
        rows = own_rows(context.accelerator, size)
        own = torch.arange(size)[rows]
        with context.accelerator.autocast(), evaluating(self.student):
            for place in steps.tolist():
                moving = own[exits[own] > place].to(context.device)
                for part in moving.split(context.config.teacher_batch_size):
                    if len(part):
                        z[part] = self.sampler.act(place, z[part], condition.rows(part))
        z = gather_rows(context.accelerator, z[rows], rows, size)
        return States(z, z.new_empty(size, 0), exits, row), 0


def whole_numbers(number: float) -> tuple[int, int]:
    """Return the whole numbers below and above ``number``;

    the same one twice where ``number`` is whole within rounding.
    """
    nearest = round(number)
    if math.isclose(number, nearest, rel_tol=1e-9, abs_tol=1e-9):
        return nearest, nearest
    return math.floor(number), math.ceil(number)


def phase_at(phases: tuple[PhaseConfig, ...], step: int, draws: int) -> tuple[PhaseConfig, int, int]:
    """Return the phase of batch ``step``, its first batch, and the batch at which it ends.

    Raises:
        IndexError: the stage has only ``draws`` batches.
    """
    first = 0
    for phase in phases:
        end = round(phase.until * draws)
        if step < end:
            return phase, first, end
        first = end
    raise IndexError(f"batch {step} is past the stage's {draws}")
