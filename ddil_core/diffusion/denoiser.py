"""The denoiser: every network becomes one function of z_t, t and a condition that returns x̂.

Guidance and reflection wrap it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_core.diffusion.parameterization import Prediction, Reflection, to_x0
from ddil_core.diffusion.schedule import Schedule
from ddil_core.support.devices import sent
from ddil_core.support.fitting import Fitting

END = "class_labels"
"""The name of the times at which jumps end, among the tensors of a condition: diffusers' name of that input."""


@dataclass(frozen=True, eq=False)
class Condition:
    """The inputs of a denoiser other than z and t. Every tensor has one row for each latent.

    Attributes:
        tensors: What the network reads, [B, …], under the network's own argument names.
        guidance: The guidance scale of each row, float32 [B]. None leaves the scale to the denoiser.
        noise: Noise for a sampler that adds noise between its steps, [B, K, C, H, W]: for each row and each step but
            the last.
    """

    tensors: dict[str, Tensor]
    guidance: Tensor | None = None
    noise: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        guidance, noise = (None if part is None else function(part) for part in (self.guidance, self.noise))
        return Condition({name: function(tensor) for name, tensor in self.tensors.items()}, guidance, noise)

    def rows(self, index: Tensor) -> Condition:
        """Return the rows ``index``, int64 [M]."""
        return self._map(lambda tensor: tensor.index_select(0, index))

    def part(self, rows: slice) -> Condition:
        """Return the rows of a slice, without a copy."""
        return self._map(lambda tensor: tensor[rows])

    def expand(self, size: int) -> Condition:
        """Repeat a single row ``size`` times, without a copy."""
        return self._map(lambda tensor: tensor.expand(size, *tensor.shape[1:]))

    def to(self, device: torch.device | str) -> Condition:
        return self._map(lambda tensor: tensor.to(device))

    def ending_at(self, s: Tensor) -> Condition:
        """Say at which times [B] the jumps of a network end that reads them. ``CLEAN`` is said as timestep 0."""
        return replace(self, tensors=self.tensors | {END: s.clamp(min=0)})

    def where(self, rows: Tensor, other: Condition) -> Condition:
        """Replace ``tensors`` by those of ``other``, a single row, where bool ``rows`` [B] is true."""
        tensors = {
            name: torch.where(rows.view(-1, *(1,) * (tensor.dim() - 1)), other.tensors[name].to(tensor.dtype), tensor)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Join the rows of several conditions. ``guidance`` and ``noise`` are left out."""
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Denoiser(Protocol):
    """``x0 = denoiser(z, t, condition)``, the estimate x̂ of the clean latents in the shape and dtype of z.

    z is float32 [B, C, H, W]. t is [B], int64, or float32 where times are fractions.

    Attributes:
        schedule: The forward process.
        nfe: How often one call evaluates the network for each row: once, or twice with guidance.
    """

    schedule: Schedule
    nfe: int

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor: ...


class ClosedForm(ABC):
    """A network that is a formula. It has no weights that a student can start from, so it makes a student's network."""

    @abstractmethod
    def student(self, width: int, depth: int) -> nn.Module:
        """Return a new network with random weights, which is called as this one is.

        Args:
            width: The number of its features.
            depth: The number of its blocks.
        """


class NetworkDenoiser(nn.Module, ABC):
    """A network of one of diffusers' layouts as a denoiser. A subclass says how its layout's network is called."""

    nfe = 1
    guided_outside = True
    """Whether diffusers guides the network by a second evaluation without a prompt, unless it ``reads_guidance``."""
    reuses_output = False
    """Whether the next call of the network overwrites its output, as a captured graph does."""

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.fitting = Fitting("a network")

    @property
    def config(self) -> Mapping[str, Any]:
        """The network's configuration, empty where it has none."""
        net = getattr(self.net, "module", self.net)  # several processes wrap a network that is trained
        config: Any = getattr(net, "config", None)
        return {} if config is None else config

    @property
    def guidance_width(self) -> int | None:
        """The width of LCM's guidance embedding. None: the network has no such input."""
        return self.config.get("time_cond_proj_dim")

    @property
    def reads_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network, which is then evaluated once at any scale."""
        return self.guidance_width is not None

    def guidance_inputs(self, scale: float | Tensor) -> dict[str, Tensor]:
        """Return the inputs [1, …] or [B, …] by which the network reads a guidance scale, or one for each row.

        They are float32, and of one scale on the CPU. Only a network that ``reads_guidance`` has such inputs.
        """
        assert self.guidance_width is not None
        return {"timestep_cond": guidance_embedding(scale - 1, self.guidance_width)}

    @property
    def reads_end(self) -> bool:
        """Whether the network is told at which time its jump ends, as a student of CTM is."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes. The shares of a divided one have another."""
        dtype: torch.dtype | None = getattr(self.net, "compute_dtype", None)
        return next(self.net.parameters()).dtype if dtype is None else dtype

    @abstractmethod
    def call(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return the network's output. z and ``inputs`` have the network's dtype."""

    def output(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's own output (ε, v, x₀ or a velocity) in the dtype of z."""
        inputs = dict(self.cast(condition).tensors)
        output = self.call(z.to(self.dtype), self.schedule.network_time(t), inputs)
        return output.to(z.dtype, copy=self.reuses_output)

    def cast(self, condition: Condition) -> Condition:
        """Return the tensors of a condition in the network's dtype. Times are not rounded."""
        tensors = condition.tensors.items()
        return Condition({name: tensor if name == END else tensor.to(self.dtype) for name, tensor in tensors})

    def x0(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return x̂ from the network's output."""
        alpha, sigma = self.schedule.at(t, z)
        return to_x0(self.prediction, output, z, alpha, sigma)

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.x0(self.output(z, t, condition), z, t)


class UNetDenoiser(NetworkDenoiser):
    """``UNet2DConditionModel``.

    Inputs: ``encoder_hidden_states`` [B, L, D]; for SDXL also ``text_embeds`` [B, D'] and ``time_ids`` [B, 6]; for LCM
    also ``timestep_cond`` [B, W], the guidance embedding; for a network that ``reads_end`` also ``class_labels`` [B],
    the times at which its jumps end. Without them they end at timestep 0.
    """

    @property
    def reads_end(self) -> bool:
        return self.config.get("class_embed_type") == "timestep"

    def call(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        if self.reads_end:
            inputs.setdefault(END, torch.zeros_like(t))
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
        return self.net(z, t, **inputs, **({"added_cond_kwargs": added} if added else {})).sample


class TransformerDenoiser(NetworkDenoiser):
    """``SD3Transformer2DModel``. Inputs: ``encoder_hidden_states`` [B, L, D] and ``pooled_projections`` [B, D']."""

    def call(self, z: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.net(hidden_states=z, timestep=t, **inputs).sample


def guidance_embedding(w: float | Tensor, width: int) -> Tensor:
    """Embed w = g − 1, a number or [B], as LCM does: float32 [B, width] on the CPU.

    The first half are sines and the second half cosines of 1000 w at falling frequencies, as in diffusers.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * torch.as_tensor(w, dtype=torch.float32).cpu().reshape(-1, 1) * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


class GuidedDenoiser:
    """A network with classifier-free guidance, ε = ε_∅ + g (ε_c − ε_∅), and after it the reflection of x̂.

    Guidance combines the raw outputs. The result is the same for ε, v, x₀ and velocities, because each is affine in the
    others at the same z. A network with a guidance embedding (LCM, FLUX.1-dev) reads g and is evaluated once.

    Args:
        network: The network.
        unconditional: The condition of the empty prompt, one row. None: the network is evaluated once, without
            guidance.
        guidance_scale: g for rows without a scale of their own in ``condition.guidance``.
        reflection: Keeps x̂ inside the data's range.
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
        self._own_scale: dict[str, Tensor] | None = None
        self._read: tuple[Condition, Condition] | None = None
        if network.reads_guidance:
            self._own_scale = network.guidance_inputs(guidance_scale)
        elif unconditional is None and guidance_scale != 1.0:
            raise ValueError(f"the guidance scale {guidance_scale:g} needs the condition of the empty prompt")
        self.nfe = 1 if unconditional is None or self._own_scale is not None else 2

    @property
    def reads_end(self) -> bool:
        return self.network.reads_end

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return x̂. Without gradients, take fewer rows at once where the memory is too small for all."""
        if torch.is_grad_enabled():
            return self._x0(z, t, condition)

        def part(rows: slice) -> Tensor:
            whole = rows == slice(0, len(z))
            return self._x0(z[rows], t[rows], condition if whole else condition.part(rows))

        parts = self.network.fitting.parts(part, len(z))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _x0(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x0 = self.network.x0(self._output(z, t, condition), z, t)
        return x0 if self.reflection is None else self.reflection(x0)

    def _output(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self._own_scale is not None:
            given = self._scale_inputs(condition.guidance, z)
            return self.network.output(z, t, Condition(self._inputs(condition).tensors | given))
        if self.unconditional is None:
            return self.network.output(z, t, self._inputs(condition))
        scale: float | Tensor = self.guidance_scale
        if condition.guidance is not None:
            scale = condition.guidance.to(z.dtype).view(-1, *(1,) * (z.dim() - 1))
        both = self._inputs(condition)
        without, with_prompt = self.network.output(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (with_prompt - without)

    def _inputs(self, condition: Condition) -> Condition:
        """Return what the network reads, in its dtype; with guidance, the rows without a prompt come first.

        The steps of a trajectory have one condition, which is prepared once. With gradients nothing is kept.
        """
        if self._read is not None and self._read[0] is condition and not torch.is_grad_enabled():
            return self._read[1]
        inputs = condition
        if self.unconditional is not None and self._own_scale is None:
            end = {END: condition.tensors[END]} if END in condition.tensors else {}
            without = self.unconditional.expand(len(condition))
            inputs = Condition.cat([replace(without, tensors=without.tensors | end), condition])
        inputs = self.network.cast(inputs)
        self._read = None if torch.is_grad_enabled() else (condition, inputs)
        return inputs

    def _scale_inputs(self, guidance: Tensor | None, z: Tensor) -> dict[str, Tensor]:
        """Return the network's inputs [B, …] of the guidance scale, on the device of z."""
        assert self._own_scale is not None
        if guidance is not None:
            return {name: sent(value, z.device) for name, value in self.network.guidance_inputs(guidance).items()}
        self._own_scale = {name: sent(value, z.device) for name, value in self._own_scale.items()}
        return {name: value.expand(len(z), *value.shape[1:]) for name, value in self._own_scale.items()}
