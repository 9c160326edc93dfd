"""Losses and targets of the distillers: pure functions of tensors."""

from __future__ import annotations

from torch import Tensor

from ddil_core.schedule import Schedule


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
