"""A student that adds fresh noise after every step, as LCM and TCD do. Rollouts collect the states on its way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.integrate import integrate
from ddil_core.diffusion.rollout import Actor
from ddil_core.diffusion.solvers import SOLVERS, Solver


@dataclass(frozen=True)
class ConsistencySampler(Actor):
    """Stochastic sampling as the only actor of a rollout, with LCM's solver or another one.

    It cannot take turns with a teacher, because it draws noise.

    The noise of all steps is drawn before the rollout (``step_noise``). So it depends neither on the batches nor on the
    processes that share the rows.
    """

    solver: Solver = SOLVERS["lcm"]

    def __post_init__(self) -> None:
        """Accept a solver that draws noise."""

    def act(self, transition: int, z: Tensor, condition: Condition) -> Tensor:
        """Take the transition's step with the noise of ``condition.noise``."""

        def noise(step: int) -> Tensor:
            assert condition.noise is not None, "the noise is drawn before, by step_noise"
            return condition.noise[:, transition]

        return integrate(self.denoiser, self.solver, z, condition, self.steps[transition], noise=noise)


def step_noise(z: Tensor, going: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the noise of a rollout, [B, K, C, H, W] on the host.

    Args:
        z: Latents [B, C, H, W] at the start.
        going: Which rows take a step and need noise for it, bool [K, B] for all K steps but the last.
        generator: A generator on the CPU.
    """
    noise = torch.zeros(len(z), *going.shape[:1], *z.shape[1:])
    for transition, rows in enumerate(going):
        noise[rows, transition] = torch.randn((int(rows.sum()), *z.shape[1:]), generator=generator)
    return noise
