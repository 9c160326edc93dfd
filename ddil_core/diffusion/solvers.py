"""Solvers: each takes one step t → s and is a pure function. To add one, write a ``Step`` and a row of ``SOLVERS``.

DDIM, Euler and flow Euler are the same map, z_s = α_s x̂ + σ_s ε̂. In x = z/α and σ' = σ/α, Euler steps along
d = (x − x̂)/σ' to x + d (σ'_s − σ'_t) = x̂ + σ'_s ε̂, which is z_s/α_s. On a flow, z + (σ_s − σ_t)(ε̂ − x̂) is z_s too,
because α = 1 − σ. The samplers of these names differ in the grid, the end, and the noise at the start
(``Solver.scaled_start``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ddil_core.diffusion.few_step import consistency_value
from ddil_core.diffusion.parameterization import to_eps
from ddil_core.diffusion.schedule import FlowSchedule, Schedule, Time, Transition
from ddil_core.support.errors import WrongCommand
from ddil_core.support.registry import Registry

Carry = Any
"""What a solver remembers of earlier steps. Only the solver itself reads it."""


class Step(Protocol):
    """One step t → s of a solver."""

    def __call__(
        self, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, carry: Carry, noise: Tensor | None, /
    ) -> tuple[Tensor, Carry]:
        """Return z_s, in the shape of z, and what the solver remembers for the next step.

        Args:
            schedule: The forward process.
            z: The latents at t, [B, …].
            t: A time for each row, [B], int64, or float32 where times are fractions.
            s: A time for each row, likewise. It may be ``CLEAN``.
            x0: The denoiser's x̂ at (z, t), [B, …].
            carry: What the solver remembers of the step before. None at the first step.
            noise: Fresh N(0, I) in the shape of z. Only stochastic solvers read it.
        """
        ...


class Corrector(Protocol):
    """Improves a step t → s by a second evaluation."""

    def __call__(
        self, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, z_s: Tensor, x0_s: Tensor, /
    ) -> Tensor:
        """Return the improved z_s. A step to a time without noise is not corrected.

        Args:
            schedule: The forward process.
            z: The latents at t, [B, …].
            t: A time for each row, [B].
            s: A time for each row, [B].
            x0: The denoiser's x̂ at (z, t), [B, …].
            z_s: The latents after the step, [B, …].
            x0_s: The denoiser's x̂ at (z_s, s), [B, …].
        """
        ...


def ddim(
    schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, carry: Carry = None, noise: Tensor | None = None
) -> tuple[Tensor, Carry]:
    """Deterministic DDIM (Song et al., 2010.02502, η = 0): z_s = α_s x̂ + σ_s ε̂.

    Euler and flow Euler take the same step.
    """
    alpha_t, sigma_t = schedule.at(t, z)
    alpha_s, sigma_s = schedule.at(s, z)
    return alpha_s * x0 + sigma_s * to_eps(x0, z, alpha_t, sigma_t), None


def dpmpp_2m(
    schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, carry: Carry = None, noise: Tensor | None = None
) -> tuple[Tensor, Carry]:
    """DPM-Solver++ 2M (Lu et al., 2211.01095) in the midpoint form. ``carry`` is (x̂, t) of the step before.

    A step to ``CLEAN`` gives x̂ itself, of first order, because λ = log(α/σ) is infinite there.
    """
    alpha_t, sigma_t = schedule.at(t, z)
    alpha_s, sigma_s = schedule.at(s, z)
    clean = sigma_s == 0
    lambda_t = torch.log(alpha_t / sigma_t)
    h = torch.where(clean, torch.ones_like(lambda_t), torch.log(alpha_s / sigma_s.clamp(min=1e-12)) - lambda_t)
    direction = x0
    if carry is not None:
        x0_before, t_before = carry
        alpha_b, sigma_b = schedule.at(t_before, z)
        ratio = (lambda_t - torch.log(alpha_b / sigma_b)) / h
        direction = torch.where(clean, x0, x0 + (x0 - x0_before) / (2 * ratio))
    z_s = (sigma_s / sigma_t) * z - alpha_s * torch.expm1(-h) * direction
    return torch.where(clean, x0, z_s), (x0, t)


def lcm(
    schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, carry: Carry = None, noise: Tensor | None = None
) -> tuple[Tensor, Carry]:
    """Multistep consistency sampling (Luo et al., 2310.04378): the consistency function's value plus noise of level s.

    For the value see ``few_step.consistency_value``.

    Raises:
        ValueError: ``noise`` is None.
    """
    if noise is None:
        raise ValueError("the lcm step adds fresh noise to its estimate; pass noise")
    alpha_s, sigma_s = schedule.at(s, z)
    return alpha_s * consistency_value(schedule, z, t, x0) + sigma_s * noise, None


GAMMA = 0.3
"""The γ of TCD's authors, and the default ``eta`` of diffusers' TCDScheduler."""


def tcd(
    schedule: Schedule,
    z: Tensor,
    t: Tensor,
    s: Tensor,
    x0: Tensor,
    carry: Carry = None,
    noise: Tensor | None = None,
    gamma: float = GAMMA,
) -> tuple[Tensor, Carry]:
    """Strategic stochastic sampling (Zheng et al., 2402.19159, Algorithm 4): DDIM's step to s', then noise up to s.

    s' is ``tcd_landing(s)``. With r = α_s/α_s', z_s = r z_s' + √(σ_s² − r² σ_s'²) noise, the forward process from s' to
    s. A step to timestep 0 or to ``CLEAN`` adds no noise.

    Args:
        gamma: 0 is DDIM; at 1 each step goes to timestep 0 and is noised again, as in LCM's sampling.

    For the other arguments see ``Step``.

    Raises:
        ValueError: ``noise`` is None.
    """
    if noise is None:
        raise ValueError("the tcd step adds fresh noise after its jump; pass noise")
    end = tcd_landing(s, gamma)
    jumped, _ = ddim(schedule, z, t, end, x0)
    (alpha_s, sigma_s), (alpha_end, sigma_end) = schedule.levels(s), schedule.levels(end)
    kept = alpha_s / alpha_end
    added = (sigma_s**2 - (kept * sigma_end) ** 2).clamp(min=0).sqrt()
    shape = (-1,) + (1,) * (z.dim() - 1)
    return kept.to(z.dtype).view(shape) * jumped + added.to(z.dtype).view(shape) * noise, None


def tcd_landing(s: Tensor, gamma: float = GAMMA) -> Tensor:
    """Return s' = ⌊(1 − γ) s⌋, to which a step of TCD to the times s [B] goes before it adds noise.

    A fraction, as on a flow, is not rounded. ``CLEAN`` stays.
    """
    lower = (1 - gamma) * s  # float32, as in diffusers
    return torch.where(s < 0, s, lower if s.is_floating_point() else lower.floor().to(s.dtype))


def heun_corrector(
    schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, z_s: Tensor, x0_s: Tensor
) -> Tensor:
    """Heun's second half-step (Karras et al., 2206.00364, Algorithm 1):

    Euler's step with the mean of the slopes at t and s.

    In x = z/α and σ' = σ/α the slope is ε̂, so that x_s = x_t + (σ'_s − σ'_t)(ε̂_t + ε̂_s)/2.
    """
    alpha_t, sigma_t = schedule.at(t, z)
    alpha_s, sigma_s = schedule.at(s, z)
    slope = (to_eps(x0, z, alpha_t, sigma_t) + to_eps(x0_s, z_s, alpha_s, sigma_s)) / 2
    return alpha_s * (z / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope)


@dataclass(frozen=True)
class Solver:
    """A row of ``SOLVERS``.

    Attributes:
        name: The name in commands, protocols and records.
        step: Takes a step t → s.
        stateful: Whether a step uses what the solver remembers of earlier steps.
        stochastic: Whether a step uses fresh noise.
        source: The paper.
        corrector: Improves a step by a second evaluation at (z_s, s). None takes no second evaluation.
        scaled_start: The spacings at which sampling starts from σ_T ε and not from ε, as diffusers' EulerDiscrete does.
        any_start: Whether a trajectory may start at pure noise, α = 0, where most grids of a flow start.
        landing: ``landing(s)`` returns the times [B] to which steps to s [B] go by x̂ alone, before they add noise. A
            network that is told where its jump ends is told these.
        with_gamma: ``with_gamma(gamma)`` returns the solver with another γ; None for a solver without one.
    """

    name: str
    step: Step
    stateful: bool
    stochastic: bool
    source: str
    corrector: Corrector | None = None
    scaled_start: tuple[str, ...] = ()
    any_start: bool = True
    landing: Callable[[Tensor], Tensor] = lambda s: s
    with_gamma: Callable[[float], Solver] | None = None

    def corrects(self, schedule: Schedule, s: Time) -> bool:
        """Whether a step to ``s`` takes a second evaluation. A step to a time without noise takes none."""
        return self.corrector is not None and s >= schedule.bounds[0]

    def calls(self, schedule: Schedule, steps: Sequence[Transition]) -> int:
        """Count the denoiser's evaluations in these transitions."""
        return len(steps) + sum(self.corrects(schedule, s) for _, s in steps)


def tcd_solver(gamma: float = GAMMA) -> Solver:
    """Return TCD's solver with a γ in [0, 1]."""
    step, landing = partial(tcd, gamma=gamma), partial(tcd_landing, gamma=gamma)
    source = "Zheng et al., 2402.19159"
    return Solver("tcd", step, False, True, source, landing=landing, with_gamma=tcd_solver)


SOLVERS = Registry(
    "solver",
    "ddil.solvers",
    Solver,
    (
        Solver("ddim", ddim, False, False, "Song et al., 2010.02502"),
        Solver("dpmpp_2m", dpmpp_2m, True, False, "Lu et al., 2211.01095", any_start=False),
        Solver("lcm", lcm, False, True, "Luo et al., 2310.04378", landing=torch.zeros_like),
        tcd_solver(),
        Solver("euler", ddim, False, False, "Karras et al., 2206.00364", scaled_start=("trailing", "linspace")),
        Solver("flow_euler", ddim, False, False, "Liu et al., 2209.03003"),
        Solver(
            *("heun", ddim, False, False, "Karras et al., 2206.00364", heun_corrector),
            scaled_start=("trailing", "linspace"),
            any_start=False,
        ),
    ),
)
"""The solvers by name. Other packages add theirs as entry points of the group ``ddil.solvers``."""


def require_start(solver: Solver, schedule: Schedule, first: Time) -> None:
    """Refuse a solver that cannot start where a trajectory starts.

    Args:
        solver: The solver.
        schedule: The forward process.
        first: The first time of the trajectory.

    Raises:
        WrongCommand: the trajectory starts at α = 0, as on a flow, and the solver divides by α.
    """
    if isinstance(schedule, FlowSchedule) and first >= len(schedule) and not solver.any_start:
        raise WrongCommand(
            f"the solver {solver.name!r} works with σ/α, which is infinite where a flow starts; use 'flow_euler'"
        )
