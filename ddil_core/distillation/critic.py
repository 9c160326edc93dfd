"""DMD2's critic: it learns the score of what the generator draws. A discriminator reads its middle block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition, NetworkDenoiser


class Critic(nn.Module):
    """A denoising network, and a discriminator of data and generated latents on the features of its middle block."""

    def __init__(self, denoiser: NetworkDenoiser, latent_side: int | None, seed: int = 0) -> None:
        """``latent_side`` is the height and width of the latents; None leaves the discriminator out."""
        super().__init__()
        self.denoiser = denoiser
        net: Any = denoiser.net
        self.head: nn.Module | None = None
        self._features: list[Tensor] = []
        block = middle_block(net)
        if latent_side is not None and block is not None:
            self.head = discriminator(*feature_shape(net, latent_side), seed)
            block.register_forward_hook(lambda _, args, output: self._features.append(as_picture(output)))

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


def middle_block(net: Any) -> nn.Module | None:
    """Return the block whose features the discriminator reads.

    It is a U-Net's mid-block, or the block at half the depth of a transformer. None: the network has no such block.
    """
    blocks = getattr(net, "transformer_blocks", None)
    block: nn.Module | None = getattr(net, "mid_block", None) if blocks is None else blocks[len(blocks) // 2]
    return block


def as_picture(features: Tensor | tuple[Tensor | None, ...]) -> Tensor:
    """Return features as [B, C, side, side]. A transformer's block gives tokens [B, side², C], SD3's after the text."""
    tokens = features[-1] if isinstance(features, tuple) else features
    assert tokens is not None
    if tokens.dim() != 3:
        return tokens
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def feature_shape(net: Any, latent_side: int) -> tuple[int, int]:
    """Return the channels and the side of the middle block's features for square latents.

    Every block of a U-Net but the last halves the side, rounded up. A transformer has a token for each patch.
    """
    config = net.config
    if hasattr(net, "transformer_blocks"):
        return config.num_attention_heads * config.attention_head_dim, latent_side // config.patch_size
    for _ in config.block_out_channels[1:]:
        latent_side = -(-latent_side // 2)
    return config.block_out_channels[-1], latent_side


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
