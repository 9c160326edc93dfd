"""Solvers: one step t → s each, pure functions of one signature. An addition is one function and one row of ``SOLVERS``.

``step(schedule, z, t, s, x0, carry, noise) -> (z_s, carry)``: ``z`` and ``x0`` [B, …], ``t`` and ``s`` [B] (per row; int64, or
float32 where times are fractions; ``s`` may be ``CLEAN``), ``carry`` what the solver remembers of earlier steps (None at first),
``noise`` fresh N(0, I) of z's shape for the solvers that ask for it.

DDIM, Euler and flow Euler are one map, z_s = α_s x̂ + σ_s ε̂. In x = z/α, Euler's step along d = (x − x̂)/σ' with σ' = σ/α is
x + d (σ'_s − σ'_t) = x̂ + σ'_s ε̂, which is z_s/α_s; on a flow, z + (σ_s − σ_t)(ε̂ − x̂) is z_s again, as α = 1 − σ. What sets the
samplers of these names apart is the grid, the end, and the noise that they start from (``Solver.scaled_start``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_core.diffusion.parameterization import boundary_scalings, to_eps
from ddil_core.diffusion.schedule import Schedule
from ddil_core.support.errors import WrongCommand

Carry = Any
Step = Callable[[Schedule, Tensor, Tensor, Tensor, Tensor, Carry, Tensor | None], tuple[Tensor, Carry]]


def ddim(
    schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, carry: Carry = None, noise: Tensor | None = None
) -> tuple[Tensor, Carry]:
    """Deterministic DDIM (Song et al., 2010.02502, η = 0): z_s = α_s x̂ + σ_s ε̂. Euler and flow Euler are this too."""
    alpha_t, sigma_t = schedule.at(t, z)
    alpha_s, sigma_s = schedule.at(s, z)
    return alpha_s * x0 + sigma_s * to_eps(x0, z, alpha_t, sigma_t), None


def dpmpp_2m(
    schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, carry: Carry = None, noise: Tensor | None = None
) -> tuple[Tensor, Carry]:
    """DPM-Solver++ 2M (Lu et al., 2211.01095), midpoint form; ``carry`` is (x̂, t) of the step before.

    A step to ``CLEAN`` gives x̂ itself, first order, as λ = log(α/σ) is infinite there.
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
    """Multistep consistency sampling (Luo et al., 2310.04378): the consistency function's value, noised afresh to s.

    The value is c_skip z + c_out x̂ (``boundary_scalings``).

    Raises:
        ValueError: no ``noise`` was given.
    """
    if noise is None:
        raise ValueError("the lcm step noises its estimate afresh, and was given no noise")
    alpha_s, sigma_s = schedule.at(s, z)
    c_skip, c_out = boundary_scalings(t, z, schedule.timestep_scaling)
    return alpha_s * (c_skip * z + c_out * x0) + sigma_s * noise, None


@dataclass(frozen=True)
class Solver:
    """A row of the table: ``stateful`` solvers remember earlier steps, ``stochastic`` ones draw fresh noise.

    ``scaled_start`` are the spacings at which the sampler of this name starts from σ_T ε and not from ε (diffusers' EulerDiscrete,
    whose σ/α at T is not infinite); ``any_start`` says whether a trajectory may start at pure noise, α = 0, as a flow's do.
    """

    name: str
    step: Step
    stateful: bool
    stochastic: bool
    source: str
    scaled_start: tuple[str, ...] = ()
    any_start: bool = True


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("ddim", ddim, False, False, "Song et al., 2010.02502"),
        Solver("dpmpp_2m", dpmpp_2m, True, False, "Lu et al., 2211.01095", any_start=False),
        Solver("lcm", lcm, False, True, "Luo et al., 2310.04378"),
        Solver("euler", ddim, False, False, "Karras et al., 2206.00364", scaled_start=("trailing", "linspace")),
        Solver("flow_euler", ddim, False, False, "Liu et al., 2209.03003"),
    )
}


def get_solver(name: str) -> Solver:
    """A solver by name.

    Raises:
        WrongCommand: there is no such solver.
    """
    if name not in SOLVERS:
        raise WrongCommand(f"the solver {name!r} is not known; it may be one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
