"""Times of few-step methods, and the consistency function, on a diffusion process and on a rectified flow.

LCM and DMD2 name times by the training timesteps 0 … T − 1 of a diffusion process. On a flow the timestep n stands for
the shifted time of (n + 1)/T, as in diffusers' schedulers. So the timesteps 999, 749, 499, 249 are the times 1000, 900,
750, 500 of a flow with shift 3: its grid of 4 steps. Self-Forcing warps DMD2's times in this way (guandeh17).
"""

from __future__ import annotations

from fractions import Fraction
from math import sqrt

from torch import Tensor

from ddil_core.diffusion.parameterization import boundary_scalings
from ddil_core.diffusion.schedule import CLEAN, FlowSchedule, Schedule, Time, lcm_grid


def time_of(schedule: Schedule, timestep: int | Fraction) -> Time:
    """Return the time of a training timestep. ``CLEAN`` stays ``CLEAN``."""
    if timestep == CLEAN or not isinstance(schedule, FlowSchedule):
        return round(timestep)
    exact = len(schedule) * schedule.shifted(Fraction(timestep + 1) / len(schedule))
    return int(exact) if exact.denominator == 1 else float(exact)


def times_of(schedule: Schedule, timesteps: Tensor) -> Tensor:
    """Return the times of training timesteps int64 [B]: the same on a process, float32 [B] on a flow."""
    if not isinstance(schedule, FlowSchedule):
        return timesteps
    size = len(schedule)
    return (size * schedule.shifted((timesteps.double() + 1) / size)).float()


def between(schedule: Schedule, timestep: int, end: int, parts: int) -> list[Time]:
    """Return the times that divide a step between two training timesteps into equal parts, without the end.

    On a flow the parts are equal before the shift, so that the even grid of 4 steps in 4 parts is that of 16. ``end``
    may be ``CLEAN``.
    """
    if isinstance(schedule, FlowSchedule):
        return [time_of(schedule, timestep + Fraction((end - timestep) * i, parts)) for i in range(parts)]
    end = 0 if end == CLEAN else end
    return [round(timestep + (end - timestep) * i / parts) for i in range(parts)]


def earlier(schedule: Schedule, time: Time, timesteps: int) -> Time:
    """Return the time that lies a number of training timesteps before another, at least 0."""
    if not isinstance(schedule, FlowSchedule):
        return max(int(time) - timesteps, 0)
    shifted = time / len(schedule)
    straight = shifted / (schedule.shift - (schedule.shift - 1) * shifted)
    return float(len(schedule) * schedule.shifted(max(straight - timesteps / len(schedule), 0.0)))


def consistency_grid(schedule: Schedule, points: int, steps: int) -> list[Time]:
    """Choose the ``steps`` times of sampling from LCM's training grid of ``points`` times.

    On a flow both are the even grids of the schedule, which nest where ``steps`` divides ``points``.
    """
    return schedule.grid(steps) if isinstance(schedule, FlowSchedule) else lcm_grid(schedule, points, steps)


def consistency_value(schedule: Schedule, z: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Return the consistency function of x̂ at z [B, …] and times [B].

    It must be z where there is no noise (Song et al., 2303.01469). On a diffusion process it is LCM's c_skip z + c_out
    x̂. On a flow x̂ = z − σ u is z at σ = 0 by itself, so that the function is x̂, as in diffusers'
    FlowMatchLCMScheduler.
    """
    if isinstance(schedule, FlowSchedule):
        return x0
    c_skip, c_out = boundary_scalings(t, z, schedule.timestep_scaling)
    return c_skip * z + c_out * x0


def scheduler_shift(schedule: FlowSchedule, steps: int) -> dict[str, float]:
    """Return the settings with which diffusers' flow schedulers take the even grid of ``steps`` steps.

    Their N times are evenly spaced from 1 to the shifted 1/T, shifted again, and stretched to end at
    ``shift_terminal``. All three are Möbius maps of the index. Their composition is the even grid of the shift S where
    a = shift − 1 solves a (T − 1)/(T + 2a + a²) = b with b = (N − 1)(S − 1)/(N + S − 1), and the end is S/(N + S − 1).
    The smaller root is taken. One step starts at 1 with any shift. Where there is no root (far more steps, or a far
    larger shift, than a student has), the schedule's own shift is returned.
    """
    shift, size = schedule.shift, len(schedule)
    b = (steps - 1) * (shift - 1) / (steps + shift - 1)
    half = size - 1 - 2 * b
    root = half**2 - 4 * b**2 * size
    if steps == 1 or half < 0 or root < 0:
        return {"shift": shift}
    return {"shift": 1 + 2 * b * size / (half + sqrt(root)), "shift_terminal": shift / (steps + shift - 1)}
