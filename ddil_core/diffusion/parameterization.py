"""Convert a network's prediction to x̂ and ε̂, and keep x̂ inside the data's range.

With v = α ε − σ x₀: x̂ = α z − σ v and ε̂ = σ z + α v. (The DDIL appendix prints a minus in ε̂. A round trip recovers ε
only with the plus.) A flow's network predicts the velocity of z_t = (1 − s) x₀ + s ε. SD3 predicts u = ε − x₀
(``flow``), and InstaFlow predicts −u (``rectified_flow``). In both cases x̂ = z − σ u.

Reflection (Lou & Ermon, 2304.04740) keeps x̂ inside a bound for each latent channel. The bound is calibrated on data.
ε̂ is then computed from the reflected x̂.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ddil_core.support.devices import sent
from ddil_core.support.errors import WrongCommand

Prediction = Literal["epsilon", "v_prediction", "sample", "flow", "rectified_flow"]
"""What a network predicts: ε, v or x₀ under diffusers' names, or a flow's velocity, from x₀ to ε or from ε to x₀."""
FLOWS = ("flow", "rectified_flow")
ReflectionMode = Literal["none", "clamp", "dynamic", "fold"]


def to_x0(prediction: Prediction, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x̂ from a network's output at z = α x₀ + σ ε.

    Args:
        prediction: What the network predicts.
        output: The network's output [B, …].
        z: The latents [B, …].
        alpha: α_t, shaped to multiply z.
        sigma: σ_t, shaped to multiply z.

    Raises:
        WrongCommand: the prediction type does not exist.
    """
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
    """Return the ε that z and x₀ imply, for σ > 0."""
    return (z - alpha * x0) / sigma


def to_v(x0: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the v that z and x₀ imply, for σ > 0: v = (α z − x₀)/σ, because α² + σ² = 1."""
    return (alpha * z - x0) / sigma


def boundary_scalings(t: Tensor, like: Tensor, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return (c_skip, c_out) of LCM's consistency function c_skip z + c_out x̂ at times [B].

    Both are shaped to multiply ``like`` [B, …]. With s = ``scaling`` · t (``Schedule.timestep_scaling``, 10 in LCM) and
    σ_data = 0.5: c_skip = 0.25/(s² + 0.25) and c_out = s/√(s² + 0.25). At t = 0 the function returns z.
    """
    s = scaling * t.to(torch.float64).clamp(min=0).view(-1, *(1,) * (like.dim() - 1))
    return (0.25 / (s**2 + 0.25)).to(like.dtype), (s / (s**2 + 0.25).sqrt()).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Reflection:
    """Keeps x̂ inside the data's range.

    Attributes:
        mode: ``none``. ``clamp``: the discretised reflected process. ``dynamic``: Imagen's thresholding, which divides
            a sample by the ``quantile`` of |x̂ − centre|/bound where it exceeds 1, and then clamps. ``fold``:
            reflection at the bound, c − |((x + c) mod 4c) − 2c|.
        centre: The middle of each channel's range, float32 [C].
        bound: Half of the width of each channel's range, float32 [C].
        quantile: The quantile of ``dynamic``.
    """

    mode: ReflectionMode
    centre: Tensor
    bound: Tensor
    quantile: float = 0.995

    def to(self, device: torch.device | str) -> Reflection:
        device = torch.device(device)
        return Reflection(self.mode, sent(self.centre, device), sent(self.bound, device), self.quantile)

    def _offset(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (1, -1) + (1,) * (x0.dim() - 2)
        centre, bound = self.centre.to(x0.dtype).view(shape), self.bound.to(x0.dtype).view(shape)
        return x0 - centre, centre, bound

    def __call__(self, x0: Tensor) -> Tensor:
        """Return x̂ [B, C, …] inside the bound, in the same shape and dtype.

        NaN and infinities stay, so that they are noticed.
        """
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
        """Return the share of each row's entries outside the bound, float32 [B]."""
        offset, _, bound = self._offset(x0)
        return (offset.abs() > bound).float().flatten(1).mean(1)

    def clipped_fraction(self, x0: Tensor) -> Tensor:
        """Return the share of all entries outside the bound, a scalar tensor."""
        return self.clipped(x0).mean()


def calibrate_reflection(latents: Tensor, mode: ReflectionMode = "clamp", quantile: float = 0.9995) -> Reflection:
    """Calibrate a bound for each channel on data latents [N, C, H, W].

    The range leaves out a share of 1 − ``quantile`` at each end. Beside the latents, this needs memory for one channel
    in float32.
    """
    ends = torch.stack([_ends(channel, 1 - quantile) for channel in latents.unbind(1)]).to(latents.device)
    low, high = ends.unbind(1)
    return Reflection(mode, (low + high) / 2, ((high - low) / 2).clamp(min=1e-6))


def _ends(values: Tensor, share: float) -> Tensor:
    """Return two values [2]: a ``share`` of all values lies below the first and above the second.

    A partition needs no sorted copy.
    """
    ordered = torch.empty(values.shape, dtype=torch.float32).copy_(values).flatten().numpy()
    last = len(ordered) - 1
    edge = min(int(share * len(ordered)), last // 2)
    ordered.partition([edge, last - edge])
    return torch.from_numpy(ordered[[edge, last - edge]])
