"""A student that samples as it is meant to be sampled, drawing fresh noise after every step, for the states that it visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.rollout import Actor
from ddil_core.diffusion.schedule import rows_at
from ddil_core.diffusion.solvers import lcm

NOISE = "noise"
"""Under this name a condition holds what the sampler draws, [B, K, C, H, W]: for each row, of each step but the last."""


@dataclass(frozen=True)
class ConsistencySampler(Actor):
    """LCM's multistep sampling as an actor of a rollout by itself. It takes no turns with a teacher: its noise is its own.

    The noise is drawn before, for all rows, and told beside the condition: so it depends neither on the batches nor on the
    processes in which the rows are taken.
    """

    def act(self, transition: int, z: Tensor, condition: Condition) -> Tensor:
        told = Condition({name: tensor for name, tensor in condition.tensors.items() if name != NOISE})
        for t, s in self.steps[transition]:
            t_rows, s_rows = rows_at(t, z), rows_at(s, z)
            x0 = self.denoiser(z, t_rows, told)
            z, _ = lcm(self.denoiser.schedule, z, t_rows, s_rows, x0, None, condition.tensors[NOISE][:, transition])
        return z


def with_noise(condition: Condition, z: Tensor, going: Tensor, generator: torch.Generator) -> Condition:
    """A condition with noise beside it for rows z; ``going`` bool [K, B] says which of them take a step."""
    noise = z.new_zeros(len(z), *going.shape[:1], *z.shape[1:])
    for transition, rows in enumerate(going):
        drawn = torch.randn((int(rows.sum()), *z.shape[1:]), generator=generator)
        noise[rows.to(z.device), transition] = drawn.to(z.device)
    return Condition(condition.tensors | {NOISE: noise})
