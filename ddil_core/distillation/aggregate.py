"""The aggregated dataset (DDIL, Algorithm 1): states that rollouts visited, with the targets the teacher has given them.

States are used in the order of a queue, each a set number of times, and then make room. Each is stored with its target, which the
teacher computes while collecting: so no target is computed twice, and an update asks the teacher for its rows of data alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_core.support.errors import WrongCommand


@dataclass(frozen=True)
class States:
    """States ``z`` [B, C, H, W] at the ``transition`` [B] of a grid, with the pool's ``row`` [B] for the caption.

    ``target`` [B, …] is what the teacher says of them (PD's x̃, or LCM's next state); ``guidance`` [B] is each state's g where it
    differs from state to state.
    """

    z: Tensor
    target: Tensor
    transition: Tensor
    row: Tensor
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    def columns(self) -> list[Tensor]:
        found = [self.z, self.target, self.transition, self.row]
        return found if self.guidance is None else [*found, self.guidance]

    def split(self, sizes: list[int]) -> list[States]:
        """Consecutive parts of so many states each."""
        columns = (column.split(sizes) for column in self.columns())
        return [States(*parts) for parts in zip(*columns, strict=True)]

    def part(self, rows: slice) -> States:
        return States(*(column[rows] for column in self.columns()))

    @staticmethod
    def cat(a: States, b: States) -> States:
        return States(*(torch.cat(pair) for pair in zip(a.columns(), b.columns(), strict=True)))


class AggregatedDataset:
    """At most ``capacity`` states z_t [C, H, W], each with its target x̃, its ``transition`` (index into the student's grid) and the
    ``row`` of its condition. States and targets live on ``device``.

    ``targets`` False keeps none (they are then [B, 0]); ``guided`` keeps each state's guidance too.
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
        """How many more times states can be drawn before something must be collected."""
        return len(self.queue)

    def add(self, states: States) -> list[int]:
        """Store visited states; returns their places, for ``enqueue``.

        Raises:
            WrongCommand: they would exceed the capacity.
        """
        count = len(states)
        if count > len(self.free):
            raise WrongCommand(
                f"the aggregated dataset holds at most {self.capacity} states and {len(self)} are still to be used; "
                "raise ddil.capacity or lower ddil.collect_every"
            )
        places = [self.free.pop() for _ in range(count)]
        index = torch.tensor(places)
        there = index.to(self.z.device)
        self.z[there], self.target[there] = states.z, states.target
        self.transition[index], self.row[index], self.remaining[index] = states.transition, states.row, self.uses
        if self.guidance is not None and states.guidance is not None:
            self.guidance[index] = states.guidance
        self.collected += count
        return places

    def enqueue(self, places: list[int], generator: torch.Generator) -> None:
        """Line new states up for use: all of them once in a random order, then again in another, ``uses`` times."""
        for _ in range(self.uses):
            self.queue.extend(places[i] for i in torch.randperm(len(places), generator=generator).tolist())

    def take(self, count: int) -> tuple[Tensor, ...]:
        """The columns of the next ``count`` ``States``: z and target [B, C, H, W], transition and row int64 [B], and the guidance
        where it is kept. A place is freed at its last use."""
        places = torch.tensor([self.queue.popleft() for _ in range(count)], dtype=torch.long)
        there = places.to(self.z.device)
        taken: tuple[Tensor, ...] = self.z[there], self.target[there], self.transition[places], self.row[places]
        if self.guidance is not None:
            taken = (*taken, self.guidance[places])
        self.used += int((self.remaining[places.unique()] == self.uses).sum())
        self.remaining.index_add_(0, places, torch.full_like(places, -1))
        self.free.extend(sorted({place for place in places.tolist() if self.remaining[place] == 0}))
        return taken

    def state_dict(self) -> dict[str, Any]:
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
        """Take up what another dataset held, of whatever capacity: the order of use counts, and the places do not.

        Raises:
            WrongCommand: it held more than this one can.
        """
        places = {place: index for index, place in enumerate(state["kept"].tolist())}
        if len(places) > self.capacity:
            raise WrongCommand(
                f"the run's aggregated dataset holds {len(places):,} states, and ddil.capacity is {self.capacity:,}; say --set "
                f"ddil.capacity={len(places)}, or more"
            )
        for name, values in state["tensors"].items():
            tensor = getattr(self, name)
            tensor[: len(places)] = values.to(tensor.device)
            tensor[len(places) :] = 0
        self.free = list(range(len(places), self.capacity))
        self.queue = deque(places[place] for place in state["queue"])
        self.collected, self.used = state["counts"]
