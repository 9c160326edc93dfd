"""How much of a network's x̂ lies outside the data's range, over all and by timestep: what the reflection has to clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_core.diffusion.parameterization import Reflection
from ddil_core.distillation.loop import Logs

BANDS = 4
"""Into how many bands of timesteps the fraction is told apart."""


class Clipped:
    """The clipped fraction of an update's x̂. Nothing is read from the device until it is logged."""

    def __init__(self, reflection: Reflection | None, timesteps: int, name: str = "clipped_fraction") -> None:
        self.reflection, self.timesteps, self.name = reflection, timesteps, name
        self._seen: list[tuple[Tensor, Tensor]] = []

    def see(self, x0: Tensor, t: Tensor) -> None:
        """x̂ [B, C, …] at timesteps [B]."""
        if self.reflection is not None:
            self._seen.append((self.reflection.clipped(x0.detach()), t))

    def logs(self) -> Logs:
        """The fraction, and that of each band of timesteps as the pair of a sum and its weight, as ``fit`` takes them."""
        if not self._seen:
            return {}
        fractions, t = (torch.cat(column) for column in zip(*self._seen, strict=True))
        found: Logs = {self.name: fractions.mean()}
        for band in range(BANDS):
            low, high = (self.timesteps * edge // BANDS for edge in (band, band + 1))
            inside = ((t >= low) & (t < high)).to(fractions.dtype)
            found[f"{self.name}_t{low}-{high - 1}"] = torch.stack([(fractions * inside).sum(), inside.sum()])
        return found
