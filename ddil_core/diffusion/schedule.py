"""The forward process, stated once: z_t = α_t x₀ + σ_t ε and SNR_t = α_t²/σ_t².

``Schedule`` is the diffusion process, α_t² + σ_t² = 1, with a timestep in [0, T). ``FlowSchedule`` is the straight line
between x₀ and ε, α_t + σ_t = 1, with a time in (0, T]. ``CLEAN`` (-1) is the end of every trajectory, with α = 1 and σ
= 0. It is not timestep 0: there Stable Diffusion still has σ = 0.029. A grid is a falling list of times, and its
transitions end at ``CLEAN``. Times are integers, except for fractions on a flow and in Euler's ``linspace``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_core.diffusion.scheduler_config import betas_of, flow_clock, require_betas
from ddil_core.support.errors import WrongCommand

CLEAN = -1
Time = int | float
Transition = tuple[Time, Time]
"""A step from the time t to the earlier time s."""
TIMESTEP_SCALING = 10.0
"""The factor of LCM, and the default of diffusers' LCMScheduler."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """α and σ of every timestep.

    Attributes:
        alphas: float64 [T + 1]. The last entry is ``CLEAN``, so that index -1 finds it.
        sigmas: float64 [T + 1], likewise.
        timestep_scaling: The factor of a timestep in LCM's boundary conditions.
    """

    alphas: Tensor
    sigmas: Tensor
    timestep_scaling: float = TIMESTEP_SCALING

    @classmethod
    def from_betas(cls, betas: np.ndarray) -> Schedule:
        """Make the schedule of the discrete process from its β [T]: ᾱ_t = Π(1 − β)."""
        squares = np.append(np.cumprod(1.0 - betas.astype(np.float64)), 1.0)
        return cls(torch.from_numpy(np.sqrt(squares)), torch.from_numpy(np.sqrt(1.0 - squares)))

    @classmethod
    def stable_diffusion(cls) -> Schedule:
        """Return Stable Diffusion's schedule: 1000 timesteps, ``scaled_linear`` β from 0.00085 to 0.012."""
        return cls.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Make the schedule from the configuration of a diffusers scheduler.

        Raises:
            WrongCommand: the scheduler has no betas (as EDM's schedulers), or a β schedule that is not known here.
        """
        require_betas(config)
        try:
            schedule = cls.from_betas(betas_of(config))
            scaling = float(config.get("timestep_scaling", TIMESTEP_SCALING))
        except (TypeError, ValueError, OverflowError) as error:
            raise WrongCommand(
                f"the scheduler's configuration holds a value that does not fit ({error}); fetch the model again"
            ) from error
        if not (isfinite(scaling) and scaling > 0):
            raise WrongCommand(f"the scheduler's timestep_scaling is a finite number above 0, not {scaling:g}")
        return replace(schedule, timestep_scaling=scaling)

    def __len__(self) -> int:
        """T: the number of training timesteps. On a flow, T is the time of pure noise."""
        return len(self.alphas) - 1

    def to(self, device: torch.device | str) -> Schedule:
        return replace(self, alphas=self.alphas.to(device), sigmas=self.sigmas.to(device))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (α_t, σ_t) at times [B], float64 [B].

        Between two timesteps, interpolate σ/α as diffusers' Euler does.
        """
        if not t.is_floating_point():
            return self.alphas[t], self.sigmas[t]
        ratios = self.sigmas / self.alphas
        below = t.double().floor().clamp(0, len(self) - 1).long()
        above = (below + 1).clamp(max=len(self) - 1)
        ratio = torch.lerp(ratios[below], ratios[above], t.double() - below).where(t >= 0, ratios[CLEAN])
        alpha = (1 + ratio**2).rsqrt()
        return alpha, alpha * ratio

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (α_t, σ_t) at times [B] in the dtype of ``like``, shaped to multiply ``like`` [B, …]."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        alpha, sigma = self.levels(t)
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)

    def snr(self, t: Tensor) -> Tensor:
        """Return α_t²/σ_t², float64 [B], infinite at ``CLEAN``."""
        alpha, sigma = self.levels(t)
        return (alpha / sigma) ** 2

    @property
    def bounds(self) -> tuple[float, int]:
        """The least and the greatest time at which a network can be evaluated."""
        return 0, len(self) - 1

    def require_inside(self, times: Sequence[Time], what: str) -> None:
        """Refuse a grid that leaves the schedule. ``what`` names the grid in messages.

        Raises:
            WrongCommand: ``times`` do not fall, or a time is outside of ``bounds``.
        """
        low, high = self.bounds
        outside = [t for t in times if not low <= t <= high]
        if outside:
            raise WrongCommand(
                f"{what} has the time {outside[0]:g}, and this model's times go from {low:g} to {high}; "
                "ask for another number of steps, or for other times"
            )
        if any(t <= s for t, s in pairwise(times)):
            raise WrongCommand(f"{what} does not fall from time to time: {', '.join(f'{t:g}' for t in times)}")

    def grid(self, steps: int) -> list[Time]:
        """Return the project's grid of ``steps`` times on this schedule. Coarser grids nest in finer ones."""
        return list(timestep_grid(steps, len(self)))

    def network_time(self, t: Tensor) -> Tensor:
        """Return what the network reads of times [B]."""
        return t

    def with_exact_times(self) -> Schedule:
        """Return the schedule of a network that reads all times as they are, without rounding."""
        return self

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return z_t = α_t x₀ + σ_t ε for timesteps [B]."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps


@dataclass(frozen=True, eq=False)
class FlowSchedule(Schedule):
    """Rectified flow: z_t = (1 − s) x₀ + s ε with s = t/T, at any time in [0, T]. At T, z is pure noise.

    Attributes:
        shift: Moves the times of grids, s ← shift·s/(1 + (shift − 1) s). SD3 has 3. The process itself has no shift.
        dynamic: Whether the shift came from the number of tokens (``dynamic_shift``).
        whole_times: Whether the network reads times rounded down, as from diffusers' DPM-Solver++ on a flow.
    """

    shift: float = 1.0
    dynamic: bool = False
    whole_times: bool = False

    @classmethod
    def straight(cls, shift: float = 1.0, num_train_timesteps: int = 1000) -> FlowSchedule:
        sigmas = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        return cls(1 - sigmas, sigmas, shift=shift)

    @property
    def bounds(self) -> tuple[float, int]:
        return 1e-6, len(self)  # at 0 there is no noise, and the network has no velocity to predict

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokens: int | None = None) -> FlowSchedule:
        """Make the schedule from the configuration of a diffusers scheduler.

        Args:
            config: The configuration of FlowMatchEulerDiscreteScheduler, or of one with ``use_flow_sigmas``.
            tokens: How many tokens the network makes of an image. A shift by the resolution needs it.

        Raises:
            WrongCommand: the scheduler moves its times by more than a shift, or the shift needs ``tokens``.
        """
        clock = flow_clock(config, tokens)
        return replace(
            cls.straight(clock.shift, clock.steps),
            dynamic=clock.dynamic,
            whole_times=bool(config.get("use_flow_sigmas")),
        )

    def network_time(self, t: Tensor) -> Tensor:
        return t.floor() if self.whole_times else t

    def with_exact_times(self) -> FlowSchedule:
        return replace(self, whole_times=False)

    @property
    def lowest(self) -> float:
        """s at the lower end of diffusers' grid, before the grid's own shift. A constant shift moves this end too."""
        return 1 / len(self) if self.dynamic else float(self.shifted(1 / len(self)))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double().clamp(min=0) / len(self)
        return 1 - sigma, sigma

    def shifted(self, s: Any) -> Any:
        """Apply the shift to s in [0, 1]. Exact for fractions."""
        shift = Fraction(self.shift) if isinstance(s, Fraction) else self.shift
        return shift * s / (1 + (shift - 1) * s)

    def grid(self, steps: int) -> list[Time]:
        """Return T · shifted(i/steps) for i = steps, …, 1. The fractions are exact, so that 4 steps nest in 32."""
        if steps < 1:
            raise WrongCommand(f"a grid has at least 1 step, not {steps}")
        exact = [len(self) * self.shifted(Fraction(i, steps)) for i in range(steps, 0, -1)]
        return [t.numerator if t.denominator == 1 else float(t) for t in exact]


def timestep_grid(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return the falling grid of ``steps`` timesteps: ``linspace(0, T − 1, steps + 1)`` rounded, reversed, without 0.

    4 steps give 999, 749, 500, 250. The 32-step grid holds all four (DDIL, covariate-shift analysis).
    """
    if not 1 <= steps < num_train_timesteps:
        raise WrongCommand(f"a grid has from 1 to {num_train_timesteps - 1} steps, not {steps}")
    # Fractions are exact, so that 499.5 rounds alike in every grid. In floats, the 60-step grid would lack 500.
    return [round(Fraction((num_train_timesteps - 1) * i, steps)) for i in range(steps, 0, -1)]


def rows_at(time: Time, like: Tensor) -> Tensor:
    """Repeat a time for every row of ``like`` [B, …]: int64 [B], or float32 [B] for a fraction."""
    dtype = torch.long if isinstance(time, int) else torch.float32
    return torch.full((len(like),), time, dtype=dtype, device=like.device)


def transitions(timesteps: Sequence[Time], end: Time = CLEAN) -> list[Transition]:
    """Return the consecutive pairs (t, s) of a grid. The last s is ``end``."""
    return list(zip(timesteps, [*timesteps[1:], end], strict=True))


def segments(fine: Sequence[Time], coarse: Sequence[Time]) -> list[list[Transition]]:
    """Group the transitions of the fine grid by the coarse transition in which they lie.

    Raises:
        WrongCommand: the coarse grid has a time that the fine grid lacks.
    """
    missing = [t for t in coarse if t not in fine]
    if missing or fine[0] != coarse[0]:
        raise WrongCommand(
            f"the grid of {len(coarse)} steps does not nest in the grid of {len(fine)} steps: "
            f"{missing or coarse[:1]} is not in the finer one; choose a number of steps that divides {len(fine)}"
        )
    starts = [fine.index(t) for t in coarse] + [len(fine)]
    steps = transitions(fine)
    return [steps[a:b] for a, b in pairwise(starts)]


LCM_STEPS = 50
"""The number of times on LCM's training grid: 19, 39, …, 999."""


def lcm_grid(schedule: Schedule, points: int, steps: int) -> list[Time]:
    """Choose the ``steps`` times of sampling from a training grid of ``points`` times. Both start at the same time.

    Raises:
        WrongCommand: the training grid has fewer times than steps, or more times than the schedule.
    """
    if steps > points:
        raise WrongCommand(
            f"the spacing 'lcm' takes from 1 to {points} steps, the points of its training grid, not {steps}"
        )
    if points > len(schedule):
        raise WrongCommand(
            f"the training grid of LCM has at most the {len(schedule)} points of the schedule, not {points}"
        )
    stride = len(schedule) // points
    return [(points - i * points // steps) * stride - 1 for i in range(steps)]


def _leading(schedule: Schedule, steps: int, offset: int) -> list[Time]:
    stride = len(schedule) // steps
    return [i * stride + offset for i in range(steps - 1, -1, -1)]


def _leading_inner(schedule: Schedule, steps: int, offset: int) -> list[Time]:
    return _leading(schedule, steps + 1, offset)[:-1]


def _trailing(schedule: Schedule, steps: int, offset: int) -> list[Time]:
    return [int(t) - 1 for t in np.arange(len(schedule), 0, -len(schedule) / steps).round()[:steps]]


def _linspace(schedule: Schedule, steps: int, offset: int) -> list[Time]:
    return [float(t) for t in np.linspace(0, len(schedule) - 1, steps, dtype=np.float32)[::-1]]


def _lcm(schedule: Schedule, steps: int, offset: int) -> list[Time]:
    return lcm_grid(schedule, LCM_STEPS, steps)


def _flow(schedule: Schedule, steps: int, offset: int) -> list[Time]:
    if not isinstance(schedule, FlowSchedule):
        raise WrongCommand("the spacing 'flow' is that of a rectified flow, and this model is none; take 'even'")
    size = len(schedule)
    return [float(size * schedule.shifted(s)) for s in np.linspace(1, schedule.lowest, steps)]


def _flow_inner(schedule: Schedule, steps: int, offset: int) -> list[Time]:
    if not isinstance(schedule, FlowSchedule):
        raise WrongCommand("the spacing 'flow_inner' is that of a rectified flow, and this model is none; take 'even'")
    size = len(schedule)
    return [float(size * schedule.shifted(s)) for s in np.linspace(0, 1 - 1 / size, steps + 1)[:0:-1]]


SPACINGS: dict[str, Callable[[Schedule, int, int], list[Time]]] = {
    "even": lambda schedule, steps, offset: schedule.grid(steps),  # the project's grid; DPM-Solver's `linspace`
    "leading": _leading,  # DDIM's and Euler's
    "leading_inner": _leading_inner,  # DPM-Solver's `leading`
    "trailing": _trailing,
    "linspace": _linspace,  # Euler's, with fractions
    "lcm": _lcm,
    "flow": _flow,  # FlowMatchEuler's, which shifts the lower end twice
    "flow_inner": _flow_inner,  # DPM-Solver++'s on a flow, which starts after pure noise
}
"""The grid of each spacing, from the schedule, the number of steps and an offset.

Names are diffusers' where it has one.
"""


def timesteps(schedule: Schedule, spacing: str, steps: int, offset: int = 0) -> list[Time]:
    """Return the falling grid of a spacing.

    Raises:
        WrongCommand: the spacing does not exist, it has no grid of so many steps on this schedule, or the grid leaves
            the schedule.
    """
    if spacing not in SPACINGS:
        raise WrongCommand(f"the spacing {spacing!r} is not known; it may be one of {', '.join(SPACINGS)}")
    if not 1 <= steps < len(schedule):
        raise WrongCommand(f"a grid has from 1 to {len(schedule) - 1} steps, not {steps}")
    times = SPACINGS[spacing](schedule, steps, offset)
    schedule.require_inside(times, f"the grid of {steps} steps with the spacing {spacing!r} and the offset {offset}")
    return times
