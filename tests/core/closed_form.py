"""A denoiser with known trajectories, and the distance between latents."""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.schedule import Schedule


class Gaussian:
    """The exact denoiser of x₀ ~ N(m, s²): x̂ = m + α s²/(α² s² + σ²) (z − α m). The condition's ``shift`` adds to m.

    On its probability flow (z_t − α_t m)/√(α_t² s² + σ_t²) is constant.
    """

    def __init__(self, schedule: Schedule, mean: float = 0.4, std: float = 0.6, nfe: int = 1) -> None:
        self.schedule, self.mean, self.std, self.nfe = schedule, mean, std, nfe

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = self.schedule.at(t, z)
        mean = self.mean + condition.tensors["shift"]
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return mean + gain * (z - alpha * mean)

    def flow(self, z: Tensor, t: int, s: int) -> Tensor:
        """Where the probability flow takes z_t at time s, without a condition."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((self.schedule.alphas[i], self.schedule.sigmas[i]) for i in (t, s))
        width_t, width_s = ((a**2 * self.std**2 + b**2).sqrt() for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        return alpha_s * self.mean + width_s * (z - alpha_t * self.mean) / width_t


def shifts(count: int, size: float = 0.0, dtype: torch.dtype = torch.float32) -> Condition:
    """A condition [B, 1, 1, 1] that differs from row to row by ``size``."""
    return Condition({"shift": (size * torch.arange(count, dtype=dtype)).view(-1, 1, 1, 1)})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖₂/‖b‖₂ in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def rows(value: int, like: Tensor) -> Tensor:
    """One timestep for every row."""
    return torch.full((len(like),), value, dtype=torch.long)
