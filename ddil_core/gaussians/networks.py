"""The networks of the gaussians world: the exact denoiser, and the small network of a student.

Both are called alike: ``net(z, alpha, sigma, classes)`` returns v for z = α x₀ + σ ε. A latent is a point, [D, 1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import ClosedForm
from ddil_core.diffusion.parameterization import to_v

FREQUENCIES = 32
"""Sines and cosines that describe the noise level to a student."""
LEVEL_SCALE = 10.0
"""What log(α/σ), which is between −3 and 4, is multiplied by before its sines are taken."""


class GaussianMixture(ModelMixin, ConfigMixin, ClosedForm):
    """The exact denoiser of a mixture of isotropic Gaussians, p(x₀) = Σ w_k N(μ_k, s_k² I).

    The modes of a class follow one another, ``modes / classes`` for each class. With z = α x₀ + σ ε,

        p(z | k) = N(α μ_k, (α² s_k² + σ²) I),
        E[x₀ | z, k] = μ_k + α s_k² / (α² s_k² + σ²) · (z − α μ_k),

    and E[x₀ | z] is their mean under the responsibilities p(k | z). With a class, k runs over its own modes; with the
    empty prompt, over all. All is computed in float32, and the responsibilities by log-sum-exp.

    Attributes:
        means: μ, float32 [modes, D].
        widths: s, float32 [modes].
        weights: w, float32 [modes]; their sum is 1.
    """

    @register_to_config
    def __init__(self, in_channels: int = 8, modes: int = 40, classes: int = 8, sample_size: int = 1) -> None:
        """Make a mixture with all means at 0. ``in_channels`` is D, the dimension of the points."""
        super().__init__()
        self.means = nn.Parameter(torch.zeros(modes, in_channels), requires_grad=False)
        self.widths = nn.Parameter(torch.ones(modes), requires_grad=False)
        self.weights = nn.Parameter(torch.full((modes,), 1 / modes), requires_grad=False)

    def student(self, width: int, depth: int) -> PointNetwork:
        """Return a new network for a student, with random weights from torch's global generator."""
        config: Any = self.config
        return PointNetwork(config.in_channels, config.classes, (width,), depth)

    def class_weights(self) -> Tensor:
        """Return the probability of each class, float32 [classes]."""
        config: Any = self.config
        return self.weights.view(config.classes, -1).sum(1)

    def log_responsibilities(self, z: Tensor, alpha: Tensor, sigma: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(k | z, class), and log p(z | class).

        Args:
            z: float32 [B, D].
            alpha: float32 [B, 1].
            sigma: float32 [B, 1].
            classes: One-hot rows [B, classes], or zeros for the empty prompt.

        Returns:
            float32 [B, modes] and [B].
        """
        allowed = classes.float().repeat_interleave(len(self.means) // classes.shape[1], 1)
        allowed = torch.where(allowed.sum(1, keepdim=True) > 0, allowed, torch.ones_like(allowed))
        prior = torch.log(self.weights.float() * allowed)
        prior = prior - prior.logsumexp(1, keepdim=True)
        variance = (alpha * self.widths.float()) ** 2 + sigma**2
        squared = (z[:, None] - alpha[..., None] * self.means.float()).square().sum(2)
        density = -0.5 * (squared / variance + z.shape[1] * torch.log(2 * torch.pi * variance))
        evidence = (prior + density).logsumexp(1, keepdim=True)
        return prior + density - evidence, evidence.squeeze(1)

    def posterior_mean(self, z: Tensor, alpha: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """Return E[x₀ | z, class], float32 [B, D]. For the arguments see ``log_responsibilities``."""
        responsibility = self.log_responsibilities(z, alpha, sigma, classes)[0].exp()
        squares = self.widths.float() ** 2
        gain = alpha * squares / (alpha**2 * squares + sigma**2)
        # The mean over k of μ_k + gain_k (z − α μ_k), with the terms in μ_k and in z apart.
        return (responsibility * (1 - alpha * gain)) @ self.means.float() + (responsibility * gain).sum(1, True) * z

    def forward(self, z: Tensor, alpha: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """Return the v of the exact x̂ at z [B, D, 1, 1], for α and σ [B, 1, 1, 1], σ > 0."""
        with torch.autocast(z.device.type, enabled=False):
            points, a, s = z.float().flatten(1), alpha.float().flatten(1), sigma.float().flatten(1)
            v = to_v(self.posterior_mean(points, a, s, classes), points, a, s)
        return v.view(z.shape).to(z.dtype)


class PointNetwork(ModelMixin, ConfigMixin):
    """A residual network that predicts v at a point, from the noise level, the class, and optionally the guidance.

    Its middle block has the name and the config keys of a U-Net's, so that DMD2's discriminator finds its features, and
    its embedding has the place of LCM's guidance (``time_cond_proj_dim``).
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        classes: int = 8,
        block_out_channels: tuple[int, ...] = (128,),
        depth: int = 3,
        time_cond_proj_dim: int | None = None,
        sample_size: int = 1,
    ) -> None:
        """Make a network with random weights.

        Args:
            in_channels: D, the dimension of the points.
            classes: The number of classes.
            block_out_channels: The number of features, under the name that a U-Net's configuration has for it.
            depth: The number of residual blocks, the middle block among them.
            time_cond_proj_dim: The width of LCM's guidance embedding; None for none.
            sample_size: The side of a latent.
        """
        super().__init__()
        width = block_out_channels[-1]
        self.gradient_checkpointing = False
        self.level = Timesteps(2 * FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(2 * FREQUENCIES, width, cond_proj_dim=time_cond_proj_dim)
        self.class_embedding = nn.Linear(classes, width, bias=False)
        self.enter = nn.Linear(in_channels, width)
        before = (depth - 1) // 2
        self.down_blocks = nn.ModuleList(Block(width) for _ in range(before))
        self.mid_block = MidBlock(width)
        self.up_blocks = nn.ModuleList(Block(width) for _ in range(depth - 1 - before))
        self.leave = nn.Linear(width, in_channels)

    def forward(
        self, z: Tensor, alpha: Tensor, sigma: Tensor, classes: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        """Return v at z [B, D, 1, 1], for α and σ [B, 1, 1, 1] and one-hot ``classes`` [B, classes]."""
        level = self.level(LEVEL_SCALE * torch.log(alpha / sigma).flatten()).to(z.dtype)
        embedding = self.time_embedding(level, timestep_cond) + self.class_embedding(classes)
        h = self.enter(z.flatten(1))
        for block in self.down_blocks:
            h = self._run(block, h, embedding)
        h = self._run(self.mid_block, h, embedding).flatten(1)
        for block in self.up_blocks:
            h = self._run(block, h, embedding)
        return self.leave(nn.functional.silu(h)).view(z.shape)

    def _run(self, block: Callable[[Tensor, Tensor], Tensor], h: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            checkpointed: Tensor = self._gradient_checkpointing_func(block, h, embedding)
            return checkpointed
        return block(h, embedding)


class Block(nn.Module):
    """A residual block: h + W₂ silu(W₁ silu(h) + embedding)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Return features [B, width]."""
        inner = self.first(nn.functional.silu(h)) + embedding
        return h + self.second(nn.functional.silu(inner))


class MidBlock(Block):
    """The block in the middle, whose features have a U-Net's shape."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Return features [B, width, 1, 1]."""
        return super().forward(h, embedding)[..., None, None]
