"""The aggregated dataset (DDIL, Algorithm 1): states that rollouts visited, with the teacher's targets.

A queue gives the order of use. Each state is used a set number of times and then makes room. The teacher computes the
target of a state once, while the state is collected. So in an update the teacher computes targets only for the rows of
data.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_core.support.devices import sent
from ddil_core.support.errors import WrongCommand


@dataclass(frozen=True)
class States:
    """States of a batch.

    Attributes:
        z: [B, C, H, W].
        target: The teacher's target [B, …]: PD's x̃, or LCM's next state.
        transition: The index of the state's transition on a grid, int64 [B].
        row: The row of the pool with the caption, int64 [B].
        guidance: The guidance scale of each state, [B]. None where all states share it.
    """

    z: Tensor
    target: Tensor
    transition: Tensor
    row: Tensor
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    def columns(self) -> list[Tensor]:
        """Return the fields in their order, without a missing guidance."""
        columns = [self.z, self.target, self.transition, self.row]
        return columns if self.guidance is None else [*columns, self.guidance]

    def split(self, sizes: list[int]) -> list[States]:
        """Split into consecutive parts of these sizes."""
        columns = (column.split(sizes) for column in self.columns())
        return [States(*parts) for parts in zip(*columns, strict=True)]

    def part(self, rows: slice) -> States:
        """Return the given rows."""
        return States(*(column[rows] for column in self.columns()))

    @staticmethod
    def cat(a: States, b: States) -> States:
        """Join two batches."""
        return States(*(torch.cat(pair) for pair in zip(a.columns(), b.columns(), strict=True)))


class AggregatedDataset:
    """At most ``capacity`` states with the columns of ``States``.

    Args:
        capacity: The largest number of states.
        uses: How often each state is used.
        latent_shape: (C, H, W).
        device: Where states and targets live.
        targets: Whether targets are kept. Otherwise they are [B, 0].
        guided: Whether the guidance of each state is kept.

    Raises:
        WrongCommand: ``uses`` is below 1.
    """

    def __init__(
        self,
        capacity: int,
        uses: int,
        latent_shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        *,
        targets: bool = True,
        guided: bool = False,
    ) -> None:
        if uses < 1:
            raise WrongCommand(f"a state is used at least once, not {uses} times")
        self.capacity, self.uses = capacity, uses
        self.z = torch.zeros(capacity, *latent_shape, device=device)
        self.target = torch.zeros(capacity, *(latent_shape if targets else (0,)), device=device)
        self.guidance = torch.zeros(capacity) if guided else None
        self.transition = torch.zeros(capacity, dtype=torch.long)
        self.row = torch.zeros(capacity, dtype=torch.long)
        self.remaining = torch.zeros(capacity, dtype=torch.long)
        self.free: list[int] = list(range(capacity))
        self.queue: deque[int] = deque()
        self.collected = 0
        self.used = 0

    def __len__(self) -> int:
        return self.capacity - len(self.free)

    @property
    def pending(self) -> int:
        """How many states can be taken before new ones must be collected."""
        return len(self.queue)

    def add(self, states: States) -> list[int]:
        """Store visited states and return their places, for ``enqueue``.

        Raises:
            WrongCommand: the states exceed the capacity.
        """
        count = len(states)
        if count > len(self.free):
            raise WrongCommand(
                f"the aggregated dataset holds at most {self.capacity} states and {len(self)} are still to be used; "
                "raise ddil.capacity or lower ddil.collect_every"
            )
        places = [self.free.pop() for _ in range(count)]
        index = torch.tensor(places)
        there = sent(index, self.z.device)
        self.z[there], self.target[there] = states.z, states.target
        self.transition[index], self.row[index], self.remaining[index] = states.transition, states.row, self.uses
        if self.guidance is not None and states.guidance is not None:
            self.guidance[index] = states.guidance
        self.collected += count
        return places

    def enqueue(self, places: list[int], generator: torch.Generator) -> None:
        """Append new states to the queue ``uses`` times, each time in another random order."""
        for _ in range(self.uses):
            self.queue.extend(places[i] for i in torch.randperm(len(places), generator=generator).tolist())

    def take(self, count: int) -> tuple[Tensor, ...]:
        """Return the columns of the next ``count`` states, in the order of ``States``.

        A place is freed at its last use.
        """
        places = torch.tensor([self.queue.popleft() for _ in range(count)], dtype=torch.long)
        there = sent(places, self.z.device)
        taken: tuple[Tensor, ...] = self.z[there], self.target[there], self.transition[places], self.row[places]
        if self.guidance is not None:
            taken = (*taken, self.guidance[places])
        self.used += int((self.remaining[places.unique()] == self.uses).sum())
        self.remaining.index_add_(0, places, torch.full_like(places, -1))
        self.free.extend(places[self.remaining[places] == 0].unique().tolist())
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the content for a checkpoint."""
        names = ["z", "target", "transition", "row", "remaining"] + ["guidance"] * (self.guidance is not None)
        kept = torch.tensor(sorted(set(range(self.capacity)) - set(self.free)), dtype=torch.long)
        tensors = {name: getattr(self, name)[kept.to(getattr(self, name).device)].cpu() for name in names}
        return {
            "kept": kept,
            "tensors": tensors,
            "free": list(self.free),
            "queue": list(self.queue),
            "counts": [self.collected, self.used],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states of another dataset, of any capacity. The order of use is kept, the places are not.

        Raises:
            WrongCommand: the other dataset holds more states than this one can.
        """
        places = {place: index for index, place in enumerate(state["kept"].tolist())}
        if len(places) > self.capacity:
            raise WrongCommand(
                f"the run's aggregated dataset holds {len(places):,} states, and ddil.capacity is {self.capacity:,}; "
                f"say --set ddil.capacity={len(places)}, or more"
            )
        for name, values in state["tensors"].items():
            tensor = getattr(self, name)
            tensor[: len(places)] = values.to(tensor.device)
            tensor[len(places) :] = 0
        self.free = list(range(len(places), self.capacity))
        self.queue = deque(places[place] for place in state["queue"])
        self.collected, self.used = state["counts"]
