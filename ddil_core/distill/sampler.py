"""A student that samples as it is meant to be sampled, drawing fresh noise after every step, for the states that it visits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddil_core.denoiser import Condition
from ddil_core.rollout import Actor
from ddil_core.schedule import rows_at
from ddil_core.solvers import lcm


@dataclass(frozen=True)
class ConsistencySampler(Actor):
    """LCM's multistep sampling as an actor of a rollout by itself. It takes no turns with a teacher: its noise is its own."""

    noise: torch.Generator | None = None

    def drawing(self, generator: torch.Generator) -> ConsistencySampler:
        """The same, with its noise from a generator."""
        return replace(self, noise=generator)

    def act(self, transition: int, z: Tensor, condition: Condition) -> Tensor:
        for t, s in self.steps[transition]:
            t_rows, s_rows = rows_at(t, z), rows_at(s, z)
            noise = torch.randn(z.shape, generator=self.noise).to(z.device)
            z, _ = lcm(self.denoiser.schedule, z, t_rows, s_rows, self.denoiser(z, t_rows, condition), None, noise)
        return z
