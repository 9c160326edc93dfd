"""The one loop that takes latents along transitions t → s. Sampling, rollouts and the distillers use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ddil_core.diffusion.denoiser import Condition, Denoiser
from ddil_core.diffusion.schedule import Transition, rows_at
from ddil_core.diffusion.solvers import Carry, Solver


def integrate(
    denoiser: Denoiser,
    solver: Solver,
    z: Tensor,
    condition: Condition,
    steps: Sequence[Transition],
    *,
    noise: Callable[[int], Tensor] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return the latents at the end of the last transition. Without transitions, return ``z``.

    Args:
        denoiser: Gives x̂.
        solver: Takes each step.
        z: Latents [B, C, H, W] at the start of the first transition.
        condition: B rows.
        steps: The transitions (t, s). All rows take the same ones.
        noise: Gives the noise [B, C, H, W] of a step by the step's index. Only stochastic solvers call it.
        observe: Receives the index of every finished step and the latents after the step.

    Raises:
        ValueError: a stochastic solver has no ``noise``.
    """
    schedule = denoiser.schedule
    carry: Carry = None
    for index, (t, s) in enumerate(steps):
        t_rows, s_rows = rows_at(t, z), rows_at(s, z)
        drawn = noise(index) if solver.stochastic and noise is not None else None
        told = condition.ending_at(solver.landing(s_rows)) if getattr(denoiser, "reads_end", False) else condition
        x0 = denoiser(z, t_rows, told)
        z_s, carry = solver.step(schedule, z, t_rows, s_rows, x0, carry, drawn)
        if solver.corrector is not None and solver.corrects(schedule, s):
            x0_s = denoiser(z_s, s_rows, told)
            z_s = solver.corrector(schedule, z, t_rows, s_rows, x0, z_s, x0_s)
        z = z_s
        if observe is not None:
            observe(index, z)
    return z
