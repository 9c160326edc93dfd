"""The one protocol that every network is turned into: z_t, t and a condition to x̂. Guidance and reflection wrap it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_core.diffusion.parameterization import Prediction, Reflection, to_x0
from ddil_core.diffusion.schedule import Schedule


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

    def where(self, rows: Tensor, other: Condition) -> Condition:
        """``other``, a single row, in the rows where bool [B] says so."""
        return Condition(
            {
                name: torch.where(
                    rows.view(-1, *(1,) * (tensor.dim() - 1)), other.tensors[name].to(tensor.dtype), tensor
                )
                for name, tensor in self.tensors.items()
            }
        )

    def to(self, device: torch.device | str) -> Condition:
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Denoiser(Protocol):
    """``x0 = denoiser(z, t, condition)``: z [B, C, H, W] float32, t [B] int64 (or float32, for fractions); x̂ in z's shape
    and dtype.

    ``nfe`` is the number of network evaluations that one call costs a row: 1, or 2 with guidance.
    """

    schedule: Schedule
    nfe: int

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor: ...


class NetworkDenoiser(nn.Module, ABC):
    """A network of one of diffusers' layouts as a denoiser. What differs between layouts is how the network is called."""

    nfe = 1

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.prediction: Prediction = prediction

    @property
    def guidance_width(self) -> int | None:
        """The width of the embedding by which the network is told its guidance (LCM's); None: it is guided from outside."""
        return getattr(getattr(self.net, "config", None), "time_cond_proj_dim", None)

    @abstractmethod
    def call(self, z: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        """The network on z and its condition in its own dtype."""

    def output(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's own output (ε, v, x₀ or a velocity), in z's dtype."""
        dtype = next(self.net.parameters()).dtype
        told = {name: tensor.to(dtype) for name, tensor in condition.tensors.items()}
        return self.call(z.to(dtype), t, told).to(z.dtype)

    def x0(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """x̂ from the network's output."""
        alpha, sigma = self.schedule.at(t, z)
        return to_x0(self.prediction, output, z, alpha, sigma)

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.x0(self.output(z, t, condition), z, t)


class UNetDenoiser(NetworkDenoiser):
    """``UNet2DConditionModel``: text as ``encoder_hidden_states`` [B, L, D]; SDXL's ``text_embeds`` [B, D'] and ``time_ids`` [B, 6]
    beside it; LCM's guidance as ``timestep_cond`` [B, W]."""

    def call(self, z: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        added = {name: told.pop(name) for name in ("text_embeds", "time_ids") if name in told}
        return self.net(z, t, **told, **({"added_cond_kwargs": added} if added else {})).sample


class TransformerDenoiser(NetworkDenoiser):
    """``SD3Transformer2DModel``: text as ``encoder_hidden_states`` [B, L, D] and ``pooled_projections`` [B, D']."""

    def call(self, z: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        return self.net(hidden_states=z, timestep=t, **told).sample


def guidance_embedding(w: float | Tensor, width: int) -> Tensor:
    """LCM's embedding of w = g − 1, one or [B], float32 [B, width]: sines, then cosines, of 1000 w at falling frequencies
    (diffusers' own)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * torch.as_tensor(w, dtype=torch.float32).cpu().reshape(-1, 1) * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


class GuidedDenoiser:
    """A network with classifier-free guidance, ε = ε_∅ + g (ε_c − ε_∅), and then reflection of x̂.

    ``guidance_scale`` 1 means none: the network is asked once. Combining the raw outputs is the same for ε, v, x₀ and velocities,
    since each is affine in the others at the same z. A network that is told its guidance (LCM) is asked once at any scale.
    """

    def __init__(
        self,
        network: NetworkDenoiser,
        unconditional: Condition | None = None,
        guidance_scale: float = 1.0,
        reflection: Reflection | None = None,
    ) -> None:
        self.network = network
        self.unconditional = unconditional
        self.guidance_scale = guidance_scale
        self.reflection = reflection
        self.schedule = network.schedule
        self.told: Tensor | None = None
        if network.guidance_width is not None:
            self.told = guidance_embedding(guidance_scale - 1, network.guidance_width)
        self.nfe = 1 if guidance_scale == 1.0 or self.told is not None else 2

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x0 = self.network.x0(self._output(z, t, condition), z, t)
        return x0 if self.reflection is None else self.reflection(x0)

    def _output(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.told is not None:
            self.told = self.told.to(z.device)
            told = Condition(condition.tensors | {"timestep_cond": self.told.expand(len(z), -1)})
            return self.network.output(z, t, told)
        if self.guidance_scale == 1.0:
            return self.network.output(z, t, condition)
        assert self.unconditional is not None, "guidance needs the condition of the empty prompt"
        both = Condition.cat([self.unconditional.expand(len(z)), condition])
        nothing, something = self.network.output(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return nothing + self.guidance_scale * (something - nothing)
