"""How long the commands of a recreation take: by the speed of this machine, and then by the commands that ended."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ddil_eval.cli.recreation import Command, together

LATE = 20
"""A command that takes longer than expected is taken to be at 19 of 20 parts of its time."""


@dataclass
class Forecast:
    """The time that commands take here.

    Attributes:
        jobs: The number of distillations at once.
        cores: The number of cores.
        slowness: The seconds that a core of this machine takes for a core second of the protocol.
        ended: The seconds that commands took, and those that were expected: of distillations (True) and of others.
    """

    jobs: int
    cores: int
    slowness: float
    ended: dict[bool, tuple[float, float]] = field(default_factory=dict)

    def expected(self, command: Command) -> float:
        """Return the seconds that a command takes by the speed of the machine.

        A distillation has one core, or less where there are fewer cores than jobs. Any other command has all cores.
        """
        cores = min(1.0, self.cores / self.jobs) if command.is_distillation else self.cores
        return command.core_seconds * self.slowness / cores

    def learn(self, command: Command, seconds: float) -> None:
        """Count a command that took so many seconds."""
        took, expected = self.ended.get(command.is_distillation, (0.0, 0.0))
        self.ended[command.is_distillation] = took + seconds, expected + self.expected(command)

    def left(self, waiting: Sequence[Command], running: Mapping[Command, float]) -> float:
        """Return the seconds until all commands are done.

        Args:
            waiting: The commands that have not begun, in their order.
            running: For each running command, the seconds since it began.
        """
        ratios = {kind: self._ratio(kind, running) for kind in (True, False)}
        rest = {command: ratios[command.is_distillation] * self.expected(command) for command in (*running, *waiting)}
        rest |= {command: max(rest[command] - since, since / LATE) for command, since in running.items()}
        total = 0.0
        for group in together([*running, *waiting]):
            ends = [0.0] * max(self.jobs, 1)
            for command in group:  # in their order, each as soon as a job is free
                heapq.heapreplace(ends, ends[0] + rest[command])
            total += max(ends)
        return total

    def _ratio(self, distillation: bool, running: Mapping[Command, float]) -> float:
        """Return how much longer than expected commands take, of this kind where one has ended."""
        ended = [self.ended[distillation]] if distillation in self.ended else list(self.ended.values())
        ratio = sum(took for took, _ in ended) / sum(expected for _, expected in ended) if ended else 1.0
        late = [since / self.expected(one) for one, since in running.items() if one.is_distillation == distillation]
        return max(ratio, *late, 0.0)
