"""The fraction of a network's x̂ that lies outside the data's range, over all timesteps and by bands of timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_core.diffusion.parameterization import Reflection
from ddil_core.distillation.training_log import Logs

BANDS = 4
"""The number of bands of timesteps that have a fraction of their own in the log."""


class ClippedFraction:
    """Measures the fraction in one update. The device is not waited for until the log is written."""

    def __init__(self, reflection: Reflection | None, timesteps: int, name: str = "clipped_fraction") -> None:
        """Start without a measurement.

        Args:
            reflection: The bounds of the data; None measures nothing.
            timesteps: The number of timesteps of the schedule.
            name: The key of the fraction in the log.
        """
        self.reflection, self.timesteps, self.name = reflection, timesteps, name
        self._measured: list[tuple[Tensor, Tensor]] = []

    def add(self, x0: Tensor, t: Tensor) -> None:
        """Measure x̂ [B, C, …] at timesteps [B]."""
        if self.reflection is not None:
            self._measured.append((self.reflection.clipped(x0.detach()), t))

    def logs(self) -> Logs:
        """Return the fraction, and for each band the pair of a sum and its weight (see ``training_log.Logs``)."""
        if not self._measured:
            return {}
        fractions, t = (torch.cat(column) for column in zip(*self._measured, strict=True))
        logs: Logs = {self.name: fractions.mean()}
        for band in range(BANDS):
            low, high = (self.timesteps * edge // BANDS for edge in (band, band + 1))
            inside = ((t >= low) & ((t < high) | (high == self.timesteps))).to(fractions.dtype)  # a flow starts at T
            logs[f"{self.name}_t{low}-{high - 1}"] = torch.stack([(fractions * inside).sum(), inside.sum()])
        return logs
