"""Losses and targets of the distillers: pure functions of tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ddil_core.diffusion.schedule import Schedule


def pd_target(schedule: Schedule, z_t: Tensor, z_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the x̃ with which one DDIM step t → s ends where the teacher's two steps end.

    Salimans & Ho, 2202.00512, eq. 8-9: x̃ = (z_s − (σ_s/σ_t) z_t) / (α_s − (σ_s/σ_t) α_t). At s = ``CLEAN`` this is
    z_s, the x̂ of the teacher's second evaluation. On a flow it is z_t − σ_t u with u = (z_t − z_s)/(σ_t − σ_s), the
    velocity of the straight line between the two.

    Args:
        schedule: The forward process.
        z_t: The latents [B, …] at the start.
        z_s: The latents [B, …] at the end of the teacher's steps.
        t: The times of z_t, [B].
        s: The times of z_s, [B].
    """
    alpha_t, sigma_t = schedule.at(t, z_t)
    alpha_s, sigma_s = schedule.at(s, z_t)
    ratio = sigma_s / sigma_t
    return (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t)


def pd_loss(x0: Tensor, target: Tensor, snr: Tensor) -> Tensor:
    """Return equation 1, max(1, SNR_t) ‖x̂ − x̃‖².

    The norm is a mean over the entries of a row, and the loss is a mean over the batch. ``x0`` and
    ``target`` are [B, …], ``snr`` is [B].
    """
    errors = (x0 - target).square().flatten(1).mean(1)
    return (snr.to(errors.dtype).clamp(min=1.0) * errors).mean()


def consistency_loss(
    value: Tensor, target: Tensor, huber_c: float | None = 0.001, weight: Tensor | None = None
) -> Tensor:
    """Return LCM's loss between two values of the consistency function.

    The loss is pseudo-Huber, √(d² + c²) − c, or d² where c is None, as a mean over all entries.

    Args:
        value: The student's value [B, …].
        target: The target's value [B, …].
        huber_c: c.
        weight: A factor for each row, [B].
    """
    d = value - target
    errors = d.square() if huber_c is None else (d.square() + huber_c**2).sqrt() - huber_c
    return errors.mean() if weight is None else (weight * errors.flatten(1).mean(1)).mean()


def matching_gradient(x: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """Return DMD2's gradient by x, (x̂_fake − x̂_real)/mean|x − x̂_real|.

    The mean is over a row's entries. All are [B, …].
    """
    scale = (x - x_real).abs().flatten(1).mean(1).clamp(min=1e-12)
    return (x_fake - x_real) / scale.view(-1, *(1,) * (x.dim() - 1))


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """Return ½ MSE(x, stopgrad(x − gradient)). The loss's gradient by x is ``gradient`` over the number of entries."""
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def gan_generator_loss(fake: Tensor) -> Tensor:
    """Return softplus(−D(fake)), the mean over logits [B]."""
    return F.softplus(-fake).mean()


def gan_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return softplus(D(fake)) + softplus(−D(real)), each a mean over its logits [B]."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()
