"""DMD2's critic: it learns the score of what the generator draws. A discriminator reads its middle block."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition, NetworkDenoiser
from ddil_core.distillation.dropout import with_seed
from ddil_core.models.image_size import Size
from ddil_core.models.memory import packed


class Critic(nn.Module):
    """A denoising network, and a discriminator of data and generated latents on the features of its middle block."""

    def __init__(self, denoiser: NetworkDenoiser, latent_size: Size | None, seed: int = 0) -> None:
        """``latent_size`` is the size (H, W) of the latents; None leaves the discriminator out."""
        super().__init__()
        self.denoiser = denoiser
        net: Any = denoiser.net
        self.head: nn.Module | None = None
        self._features: list[Tensor] = []
        block = middle_block(net)
        if latent_size is not None and block is not None:
            channels, size = feature_shape(net, latent_size)
            self.head = discriminator(channels, size, seed)
            block.register_forward_hook(lambda _, args, output: self._features.append(as_picture(output, size)))

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

    It is a U-Net's mid-block, or the block at half the depth of a transformer. FLUX's blocks that text and image share
    follow those with weights for each. None: the network has no such block.
    """
    if not hasattr(net, "transformer_blocks"):
        block: nn.Module | None = getattr(net, "mid_block", None)
        return block
    blocks: list[nn.Module] = [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]
    return blocks[len(blocks) // 2]


def as_picture(features: Tensor | tuple[Tensor | None, ...], size: Size) -> Tensor:
    """Return features as [B, C, H, W]. A transformer's block gives tokens [B, HW, C], after any of the text."""
    tokens = features[-1] if isinstance(features, tuple) else features
    assert tokens is not None
    return tokens if tokens.dim() != 3 else tokens.transpose(1, 2).unflatten(2, size)


def feature_shape(net: Any, latent_size: Size) -> tuple[int, Size]:
    """Return the channels and the size (H, W) of the middle block's features for latents of ``latent_size``.

    Every block of a U-Net but the last halves the sides, rounded up. A transformer has a token for each patch.
    """
    config, (height, width) = net.config, latent_size
    if hasattr(net, "transformer_blocks"):
        patch = packed(config) * config.patch_size
        return config.num_attention_heads * config.attention_head_dim, (height // patch, width // patch)
    for _ in config.block_out_channels[1:]:
        height, width = -(-height // 2), -(-width // 2)
    return config.block_out_channels[-1], (height, width)


def discriminator(channels: int, size: Size, seed: int = 0) -> nn.Sequential:
    """Return a network from features [B, C, H, W] of ``size`` to logits [B, 1, 1, 1].

    Its first weights depend on the seed alone.

    Convolutions of stride 2 reduce each side to at most 4. One convolution covers what is left, and one gives the
    logit.
    """
    groups = math.gcd(32, channels)
    if groups == channels:
        groups //= 2  # a group of one number would always normalise to 0

    def block(kernel: Size, stride: Size, padding: Size) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, kernel, stride, padding),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
        ]

    with with_seed(seed):
        layers: list[nn.Module] = []
        while max(size) > 4:
            kernels, strides, paddings = zip(*((4, 2, 1) if side > 4 else (1, 1, 0) for side in size), strict=True)
            layers += block(kernels, strides, paddings)
            size = size[0] // strides[0], size[1] // strides[1]
        return nn.Sequential(*layers, *block(size, (1, 1), (0, 0)), nn.Conv2d(channels, 1, 1))
