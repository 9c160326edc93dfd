"""The one protocol that every network is turned into: z_t, t and a condition to x̂. Guidance and reflection wrap it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ddil_core.parameterization import Prediction, Reflection, to_x0
from ddil_core.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Condition:
    """What a network is told beside z and t: tensors [B, …] under the network's own argument names."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Tensor) -> Condition:
        """The given rows, int64 [M]."""
        return Condition({name: tensor.index_select(0, index) for name, tensor in self.tensors.items()})

    def expand(self, size: int) -> Condition:
        """A single row for a whole batch."""
        return Condition({name: tensor.expand(size, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Denoiser(Protocol):
    """``x0 = denoiser(z, t, condition)``: z [B, C, H, W] float32, t int64 [B]; x̂ in z's shape and dtype.

    ``nfe`` is the number of network evaluations that one call costs a row: 1, or 2 with guidance.
    """

    schedule: Schedule
    nfe: int

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor: ...


class UNetDenoiser(nn.Module):
    """Stable Diffusion's layout: a ``UNet2DConditionModel`` that reads text as ``encoder_hidden_states`` [B, L, D]."""

    nfe = 1

    def __init__(self, unet: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction: Prediction = prediction

    def output(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's own output (ε, v or x₀), in z's dtype."""
        dtype = next(self.unet.parameters()).dtype
        tensors = {name: tensor.to(dtype) for name, tensor in condition.tensors.items()}
        return self.unet(z.to(dtype), t, **tensors).sample.to(z.dtype)

    def x0(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """x̂ from the network's output."""
        alpha, sigma = self.schedule.at(t, z)
        return to_x0(self.prediction, output, z, alpha, sigma)

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.x0(self.output(z, t, condition), z, t)


class GuidedDenoiser:
    """A network with classifier-free guidance, ε = ε_∅ + g (ε_c − ε_∅), and then reflection of x̂.

    ``guidance_scale`` 1 means none: the network is asked once. Combining the raw outputs is the same for ε, v and x₀, since
    each is affine in the others at the same z.
    """

    def __init__(
        self,
        network: UNetDenoiser,
        unconditional: Condition | None = None,
        guidance_scale: float = 1.0,
        reflection: Reflection | None = None,
    ) -> None:
        self.network = network
        self.unconditional = unconditional
        self.guidance_scale = guidance_scale
        self.reflection = reflection
        self.schedule = network.schedule
        self.nfe = 1 if guidance_scale == 1.0 else 2

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x0 = self.network.x0(self._output(z, t, condition), z, t)
        return x0 if self.reflection is None else self.reflection(x0)

    def _output(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.guidance_scale == 1.0:
            return self.network.output(z, t, condition)
        assert self.unconditional is not None, "guidance needs the condition of the empty prompt"
        both = Condition.cat([self.unconditional.expand(len(z)), condition])
        nothing, something = self.network.output(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return nothing + self.guidance_scale * (something - nothing)
