"""The denoiser of points. This file imports no library of networks, so that the table of layouts loads fast."""

from __future__ import annotations

from torch import Tensor

from ddil_core.diffusion.denoiser import NetworkDenoiser


class PointDenoiser(NetworkDenoiser):
    """A network of points. Inputs: ``classes`` [B, C]; for LCM also ``timestep_cond`` [B, W]."""

    def call(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.net(z, *self.schedule.at(t, z), **inputs)
