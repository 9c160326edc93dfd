"""What the configuration of a diffusers scheduler says of the process: its β, or the clock of a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isfinite
from typing import Any

import numpy as np

from ddil_core.support.errors import WrongCommand


@dataclass(frozen=True)
class FlowClock:
    """The times of a rectified flow.

    Attributes:
        shift: The shift of the grid's times.
        steps: T, the time of pure noise.
        dynamic: Whether the shift came from the number of tokens.
    """

    shift: float
    steps: int
    dynamic: bool


def flow_clock(config: Mapping[str, Any], tokens: int | None) -> FlowClock:
    """Return the clock of a flow.

    Args:
        config: The configuration of FlowMatchEulerDiscreteScheduler, or of a scheduler with ``use_flow_sigmas``.
        tokens: How many tokens the network makes of an image. A shift by the resolution needs it.

    Raises:
        WrongCommand: the scheduler moves its times by more than a shift, or the shift needs ``tokens``.
    """
    unknown = [key for key in FLOW_VARIANTS if config.get(key)]
    dynamic, by_solver = bool(config.get("use_dynamic_shifting")), bool(config.get("use_flow_sigmas"))
    if dynamic and (by_solver or tokens is None):
        unknown.append("use_dynamic_shifting")
    if unknown:
        raise WrongCommand(f"the scheduler's {unknown[0]} is not known here; take a model whose shift is constant")
    try:
        steps = int(config.get("num_train_timesteps", 1000))
        shift = float(config.get("flow_shift" if by_solver else "shift", 1.0))
        if dynamic and tokens is not None:
            shift = dynamic_shift(config, tokens)
    except (TypeError, ValueError, OverflowError) as error:
        raise WrongCommand(
            f"the scheduler's configuration holds a value that does not fit ({error}); fetch the model again"
        ) from error
    if not (isfinite(shift) and shift > 0 and steps > 0):
        raise WrongCommand(f"the scheduler's shift and num_train_timesteps are above 0, not {shift:g} and {steps}")
    return FlowClock(shift, steps, dynamic)


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift of a flow whose times depend on the resolution, as FLUX and SD3 have it in diffusers.

    μ rises linearly with the number of tokens, from ``base_shift`` at ``base_image_seq_len`` to ``max_shift`` at
    ``max_image_seq_len``. The shift is e^μ, or μ itself where ``time_shift_type`` is linear.

    Args:
        config: The configuration of the scheduler.
        tokens: The number of the image's tokens.

    Raises:
        ValueError: ``time_shift_type`` is another one.
    """
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"the time_shift_type is {kind!r}")
    low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    first, last = int(config.get("base_image_seq_len", 256)), int(config.get("max_image_seq_len", 4096))
    if first == last:
        raise ValueError(f"base_image_seq_len and max_image_seq_len are both {first}")
    mu = low + (high - low) / (last - first) * (tokens - first)
    return exp(mu) if kind == "exponential" else mu


def has_betas(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration describes a discrete process by its β."""
    return "beta_schedule" in config or config.get("trained_betas") is not None


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration describes a rectified flow.

    One with a ``shift`` and without β does, and one with ``use_flow_sigmas`` for a network that predicts a velocity.
    """
    if config.get("use_flow_sigmas"):
        return config.get("prediction_type") == FLOW_PREDICTION
    return "shift" in config and not has_betas(config)


def require_betas(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler that does not describe its process by β alone.

    Raises:
        WrongCommand: the scheduler has no betas (EDM's schedulers have another preconditioning), or it changes the
            process that they give.
    """
    if not has_betas(config):
        kind = config.get("_class_name", "its scheduler")
        raise WrongCommand(
            f"the scheduler {kind} has no betas and is no rectified flow, so that the model's noise schedule is not "
            "known here; take a model with a scheduler such as DDIMScheduler or FlowMatchEulerDiscreteScheduler"
        )
    changed = [key for key, usual in BETA_VARIANTS.items() if config.get(key) not in (None, usual)]
    if changed:
        raise WrongCommand(f"the scheduler's {changed[0]} is not known here; use a model trained without it")


BETA_VARIANTS = {
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "snr_shift_scale": 1.0,
    "timestep_type": "discrete",  # "continuous" evaluates the network at log(σ)/4
}
"""Settings that change the process or the network's time, each with the value that changes nothing."""


def betas_of(config: Mapping[str, Any]) -> np.ndarray:
    """Return β [T] of a configuration. Raises WrongCommand or ValueError."""
    steps, trained = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if trained is not None:
        betas = np.asarray(trained, dtype=np.float64)
        if betas.shape != (steps,):
            raise ValueError(f"trained_betas are {betas.size}, and num_train_timesteps is {steps}")
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == "linear":
        betas = np.linspace(start, end, steps)
    else:
        raise WrongCommand(
            f"the scheduler's beta_schedule {kind!r} is not known; it may be 'scaled_linear' or 'linear'"
        )
    if not len(betas) or not ((betas > 0) & (betas < 1)).all():  # NaN fails this too
        raise ValueError("betas lie between 0 and 1")
    return betas


FLOW_PREDICTION = "flow_prediction"
"""diffusers' name for a network that predicts a velocity, in schedulers that know other predictions too."""
FLOW_VARIANTS = (
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
"""Settings of diffusers' flow scheduler that are not supported here."""
