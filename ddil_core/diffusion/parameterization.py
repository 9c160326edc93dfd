"""What a network predicts, and what that says of x₀ and ε. With v = α ε − σ x₀:

x̂ = α z − σ v and ε̂ = σ z + α v (the DDIL appendix prints a minus in ε̂; a round trip recovers ε only with the plus).

A flow's networks predict the velocity of z_t = (1 − s) x₀ + s ε, as SD3 does, u = ε − x₀ (``flow``), or, as InstaFlow does, its
opposite (``rectified_flow``); x̂ = z − σ u there.

Also the reflection of x̂ (Lou & Ermon, 2304.04740): a bound for each latent channel, calibrated from data, that x̂ is kept
inside of; ε̂ is then taken from the reflected x̂.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ddil_core.support.errors import WrongCommand

Prediction = Literal["epsilon", "v_prediction", "sample", "flow", "rectified_flow"]
"""The names that diffusers' schedulers give to ε, v and x₀; and a flow's velocity, from x₀ to ε or the other way."""
FLOWS = ("flow", "rectified_flow")
ReflectionMode = Literal["none", "clamp", "dynamic", "fold"]


def to_x0(prediction: Prediction, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x̂ from a network's output at z = α x₀ + σ ε."""
    if prediction == "v_prediction":
        return alpha * z - sigma * output
    if prediction == "epsilon":
        return (z - sigma * output) / alpha
    if prediction == "sample":
        return output
    if prediction == "flow":
        return z - sigma * output
    if prediction == "rectified_flow":
        return z + sigma * output
    raise WrongCommand(
        f"the prediction type {prediction!r} is not known; it may be one of {', '.join(get_args(Prediction))}"
    )


def to_eps(x0: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The ε that z and x₀ imply, for σ > 0."""
    return (z - alpha * x0) / sigma


def to_v(x0: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The v that z and x₀ imply, for σ > 0: v = (α z − x₀)/σ, as α² + σ² = 1."""
    return (alpha * z - x0) / sigma


def boundary_scalings(t: Tensor, like: Tensor, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of a consistency function c_skip z + c_out x̂ at times [B], shaped to multiply ``like`` [B, …].

    LCM's, with s = ``scaling`` · t (``Schedule.timestep_scaling``, 10 in LCM) and σ_data = 0.5: c_skip = 0.25/(s² + 0.25),
    c_out = s/√(s² + 0.25), so that it is z itself at t = 0.
    """
    s = scaling * t.to(torch.float64).clamp(min=0).view(-1, *(1,) * (like.dim() - 1))
    return (0.25 / (s**2 + 0.25)).to(like.dtype), (s / (s**2 + 0.25).sqrt()).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Reflection:
    """How x̂ is kept inside the data's range: ``centre`` ± ``bound``, each float32 [C].

    Modes: ``none``; ``clamp`` (the discretised reflected process); ``dynamic`` (Imagen's quantile: a sample whose
    ``quantile`` of \\|x̂ − centre\\|/bound exceeds 1 is shrunk by it, then clamped); ``fold`` (true reflection,
    c − \\|((x + c) mod 4c) − 2c\\|, which cannot escape).
    """

    mode: ReflectionMode
    centre: Tensor
    bound: Tensor
    quantile: float = 0.995

    def to(self, device: torch.device | str) -> Reflection:
        return Reflection(self.mode, self.centre.to(device), self.bound.to(device), self.quantile)

    def _offset(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (1, -1) + (1,) * (x0.dim() - 2)
        centre, bound = self.centre.to(x0.dtype).view(shape), self.bound.to(x0.dtype).view(shape)
        return x0 - centre, centre, bound

    def __call__(self, x0: Tensor) -> Tensor:
        """x̂ [B, C, …] inside the bound, same shape and dtype. What is not finite stays so, since the bound would hide it."""
        return x0 if self.mode == "none" else torch.where(torch.isfinite(x0), self._inside(x0), x0)

    def _inside(self, x0: Tensor) -> Tensor:
        offset, centre, bound = self._offset(x0)
        if self.mode == "clamp":
            return centre + torch.minimum(torch.maximum(offset, -bound), bound)
        if self.mode == "dynamic":
            excess = torch.quantile((offset / bound).abs().flatten(1).float(), self.quantile, dim=1).clamp(min=1.0)
            scaled = offset / excess.to(x0.dtype).view(-1, *(1,) * (x0.dim() - 1))
            return centre + torch.minimum(torch.maximum(scaled, -bound), bound)
        if self.mode == "fold":
            return centre + bound - (torch.remainder(offset + bound, 4 * bound) - 2 * bound).abs()
        raise WrongCommand(
            f"the reflection {self.mode!r} is not known; it may be one of {', '.join(get_args(ReflectionMode))}"
        )

    def clipped(self, x0: Tensor) -> Tensor:
        """The share of each x̂'s entries outside the bound, float32 [B]."""
        offset, _, bound = self._offset(x0)
        return (offset.abs() > bound).float().flatten(1).mean(1)

    def clipped_fraction(self, x0: Tensor) -> Tensor:
        """The share of x̂'s entries outside the bound, a scalar tensor."""
        return self.clipped(x0).mean()


def calibrate_reflection(latents: Tensor, mode: ReflectionMode = "clamp", quantile: float = 0.9995) -> Reflection:
    """A bound for each channel from data latents [N, C, H, W]: the range that holds all but 1 − ``quantile`` at each end.

    Beside the latents it needs the memory of one channel in float32, whatever their dtype.
    """
    ends = torch.stack([_ends(channel, 1 - quantile) for channel in latents.unbind(1)]).to(latents.device)
    low, high = ends.unbind(1)
    return Reflection(mode, (low + high) / 2, ((high - low) / 2).clamp(min=1e-6))


def _ends(values: Tensor, share: float) -> Tensor:
    """The two values [2] that ``share`` of all values lie below and above; found by a partition, which needs no sorted copy."""
    ordered = torch.empty(values.shape, dtype=torch.float32).copy_(values).flatten().numpy()
    last = len(ordered) - 1
    edge = min(int(share * len(ordered)), last // 2)
    ordered.partition([edge, last - edge])
    return torch.from_numpy(ordered[[edge, last - edge]])
