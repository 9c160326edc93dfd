"""DMD2's critic: it learns the score of what the generator draws, and has a discriminator on its mid-block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition, NetworkDenoiser


class Critic(nn.Module):
    """A denoising network, and a discriminator of data and generated latents on its mid-block's features."""

    def __init__(self, denoiser: NetworkDenoiser, side: int | None, seed: int = 0) -> None:
        """``side`` is the height and width of the mid-block; None leaves the discriminator out."""
        super().__init__()
        self.denoiser = denoiser
        net: Any = denoiser.net
        self.head = None if side is None else discriminator(net.config.block_out_channels[-1], side, seed)
        self._features: list[Tensor] = []
        if side is not None:
            net.mid_block.register_forward_hook(lambda _, args, output: self._features.append(output))

    def enable_gradient_checkpointing(self) -> None:
        net: Any = self.denoiser.net
        net.enable_gradient_checkpointing()

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Return the network's output at z, and the discriminator's logits [B] or None. One evaluation gives both."""
        self._features.clear()
        output = self.denoiser.output(z, t, condition)
        if self.head is None:
            return output.float(), None
        return output.float(), self.head(self._features.pop()).float().flatten()


def discriminator(channels: int, side: int, seed: int = 0) -> nn.Sequential:
    """Return a network from features [B, C, side, side] to logits [B, 1, 1, 1].

    Its first weights depend on the seed alone.

    Convolutions of stride 2 reduce the side to at most 4. One convolution covers that whole side, and one gives the
    logit.
    """
    groups = math.gcd(32, channels)
    if groups == channels:
        groups //= 2  # a group of one number would always normalise to 0

    def block(kernel: int, stride: int, padding: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, kernel, stride, padding),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
        ]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        while side > 4:
            layers += block(4, 2, 1)
            side //= 2
        return nn.Sequential(*layers, *block(side, 1, 0), nn.Conv2d(channels, 1, 1))


def mid_side(net: Any, latent_size: int) -> int:
    """Return the side of a U-Net's mid-block. Every block but the last halves ``latent_size``, rounded up."""
    for _ in net.config.block_out_channels[1:]:
        latent_size = -(-latent_size // 2)
    return latent_size
