"""Losses and targets of the distillers: pure functions of tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ddil_core.diffusion.schedule import Schedule


def pd_target(schedule: Schedule, z_t: Tensor, z_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x̃ that takes one DDIM step t → s to where the teacher's two steps arrived (Salimans & Ho, 2202.00512, eq. 8-9).

    x̃ = (z_s − (σ_s/σ_t) z_t) / (α_s − (σ_s/σ_t) α_t), for z_t and z_s [B, …], t and s int64 [B]. Where s is ``CLEAN`` this is
    z_s itself, the x̂ of the teacher's second evaluation.
    """
    alpha_t, sigma_t = schedule.at(t, z_t)
    alpha_s, sigma_s = schedule.at(s, z_t)
    ratio = sigma_s / sigma_t
    return (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t)


def pd_loss(x0: Tensor, target: Tensor, snr: Tensor) -> Tensor:
    """Equation 1: max(1, SNR_t) ‖x̂ − x̃‖², the norm as a mean over a sample's entries, then the mean over the batch.

    ``x0`` and ``target`` [B, …], ``snr`` [B].
    """
    errors = (x0 - target).square().flatten(1).mean(1)
    return (snr.to(errors.dtype).clamp(min=1.0) * errors).mean()


def consistency_loss(
    value: Tensor, target: Tensor, huber_c: float | None = 0.001, weight: Tensor | None = None
) -> Tensor:
    """LCM's loss between two values of the consistency function [B, …]: pseudo-Huber √(d² + c²) − c, or d² where c is None; the
    mean over all entries, a row's times its ``weight`` [B] where there is one."""
    d = value - target
    errors = d.square() if huber_c is None else (d.square() + huber_c**2).sqrt() - huber_c
    return errors.mean() if weight is None else (weight * errors.flatten(1).mean(1)).mean()


def matching_gradient(x: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """DMD2's gradient by x, (x̂_fake − x̂_real)/mean|x − x̂_real|, the mean over a sample's entries; all [B, …]."""
    scale = (x - x_real).abs().flatten(1).mean(1).clamp(min=1e-12)
    return (x_fake - x_real) / scale.view(-1, *(1,) * (x.dim() - 1))


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """½ MSE(x, stopgrad(x − gradient)): its gradient by x is ``gradient`` over the number of entries."""
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def gan_generator_loss(fake: Tensor) -> Tensor:
    """softplus(−D(fake)), the mean over logits [B]."""
    return F.softplus(-fake).mean()


def gan_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(−D(real)), each the mean over its logits [B]."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()
