"""The forward process, stated once: z_t = α_t x₀ + σ_t ε, with α_t² + σ_t² = 1 and SNR_t = α_t²/σ_t².

A timestep is an integer in [0, T); ``CLEAN`` (-1) is the end of every trajectory, where α = 1 and σ = 0 (not ᾱ₀, whose σ
is 0.029 in Stable Diffusion). A grid is a falling list of timesteps; its transitions end at ``CLEAN``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_core.errors import WrongCommand

CLEAN = -1


@dataclass(frozen=True, eq=False)
class Schedule:
    """α and σ for every timestep, float64 [T + 1]; the last entry is ``CLEAN``, so that index -1 finds it."""

    alphas: Tensor
    sigmas: Tensor

    @classmethod
    def from_betas(cls, betas: np.ndarray) -> Schedule:
        """From β [T] of the discrete process, ᾱ_t = Π(1 − β)."""
        squares = np.append(np.cumprod(1.0 - betas.astype(np.float64)), 1.0)
        return cls(torch.from_numpy(np.sqrt(squares)), torch.from_numpy(np.sqrt(1.0 - squares)))

    @classmethod
    def stable_diffusion(cls) -> Schedule:
        """1000 timesteps, ``scaled_linear`` β from 0.00085 to 0.012."""
        return cls.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """From the configuration of a diffusers scheduler.

        Raises:
            WrongCommand: a β schedule that is not known here.
        """
        steps = config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if config.get("rescale_betas_zero_snr"):
            raise WrongCommand(
                "the scheduler's rescale_betas_zero_snr is not known here; use a model trained without it"
            )
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"])
        elif kind == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, steps) ** 2
        elif kind == "linear":
            betas = np.linspace(start, end, steps)
        else:
            raise WrongCommand(
                f"the scheduler's beta_schedule {kind!r} is not known; it may be 'scaled_linear' or 'linear'"
            )
        return cls.from_betas(betas)

    def __len__(self) -> int:
        return len(self.alphas) - 1

    def to(self, device: torch.device | str) -> Schedule:
        return Schedule(self.alphas.to(device), self.sigmas.to(device))

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t) for timesteps [B], in ``like``'s dtype, shaped to multiply ``like`` [B, …]."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        return self.alphas[t].to(like.dtype).view(shape), self.sigmas[t].to(like.dtype).view(shape)

    def snr(self, t: Tensor) -> Tensor:
        """α_t²/σ_t², float64 [B]; infinite at ``CLEAN``."""
        return (self.alphas[t] / self.sigmas[t]) ** 2

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = α_t x₀ + σ_t ε for timesteps [B]."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps


def grid(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """The falling grid of ``steps`` timesteps: ``linspace(0, T − 1, steps + 1)`` rounded, reversed, without its 0.

    4 steps give 999, 749, 500, 250; the 32-step grid holds every point of it (DDIL, covariate-shift analysis).
    """
    if not 1 <= steps < num_train_timesteps:
        raise WrongCommand(f"a grid has from 1 to {num_train_timesteps - 1} steps, not {steps}")
    # Exact, since 499.5 must round alike in every grid: in floating point the 60-step grid lacks the 4-step grid's 500.
    return [round(Fraction((num_train_timesteps - 1) * i, steps)) for i in range(steps, 0, -1)]


def transitions(timesteps: list[int]) -> list[tuple[int, int]]:
    """Consecutive pairs (t, s) of a grid; the last s is ``CLEAN``."""
    return list(zip(timesteps, [*timesteps[1:], CLEAN], strict=True))


def segments(fine: list[int], coarse: list[int]) -> list[list[tuple[int, int]]]:
    """The fine grid's transitions, gathered by the coarse transition that they lie in.

    Raises:
        WrongCommand: the coarse grid has a point that the fine one lacks.
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
