"""Low-rank adapters (LoRA: Hu et al., 2106.09685): students that train small matrices beside a frozen base.

A network that holds adapters is the base with PEFT's layers in it. Several such networks, and the frozen teacher, can
share one base in memory: each has modules and tensors of its own, and the tensors of the base read the same memory. So
a network is moved or rounded without the others, and then shares nothing with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.distillation.autocast import ROUNDED
from ddil_core.distillation.dropout import with_seed
from ddil_core.distillation.lora_config import LoraConfig
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand

TARGETS = {
    "unet": (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ),
    "transformer": (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
}
"""The layers that are adapted where a configuration names none, by the name of the network in a pipeline.

Those of a U-Net are LCM-LoRA's (diffusers, examples/consistency_distillation).
"""


def require_lora(model: Model, lora: LoraConfig | None) -> None:
    """Refuse a LoRA that the teacher's network has no place for.

    Raises:
        WrongCommand: the network takes no adapters, here or in diffusers, or has no layer of a name in
            ``lora.targets``.
    """
    if lora is None:
        return
    if model.layout.network not in TARGETS:
        raise WrongCommand(
            f"a LoRA adapts the layers of a U-Net or a transformer, which {model.reference!r} has not; leave the LoRA "
            "out"
        )
    if not hasattr(model.denoiser.net, "add_adapter"):
        raise WrongCommand(
            f"diffusers has no LoRA for the network of {model.reference!r}, {type(model.denoiser.net).__name__}; leave "
            "the LoRA out"
        )
    layers = [name for name, part in model.denoiser.net.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    for target in lora.targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise WrongCommand(
                f"lora.targets names {target!r}, and the network of {model.reference!r} has no linear layer or "
                "convolution of this name; name the ends of layers' names, such as to_q"
            )


def with_lora(net: nn.Module, lora: LoraConfig) -> nn.Module:
    """Return a network with adapters that start at zero beside ``net``, in whose memory its frozen base stays.

    The first weights of the adapters are the same in every run.
    """
    import peft

    adapted: Any = copy.deepcopy(net, _in_place((*net.parameters(), *net.buffers())))
    targets = lora.targets or TARGETS["unet" if hasattr(net, "down_blocks") else "transformer"]
    with with_seed(0, next(net.parameters()).device):
        adapted.add_adapter(peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(targets)))
    return adapted


def has_lora(net: nn.Module) -> bool:
    """Return whether a network holds adapters."""
    return hasattr(net, "peft_config")


def own_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a network. A network with adapters shares the memory of its frozen base with the copy."""
    return copy.deepcopy(net, _in_place(tensor for _, _, tensor in _base(net)) if has_lora(net) else None)


def with_adapters(net: nn.Module, adapters: Mapping[str, Tensor]) -> nn.Module:
    """Return a network with other weights of its adapters, by their names in it, on the same base in memory."""
    other = own_copy(net)
    for name, tensor in adapters.items():
        weight = other.get_parameter(name)
        weight.data = tensor.detach().to(weight, copy=True)
    return other


def take_base(
    net: nn.Module,
    other: nn.Module,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    *,
    autocast: bool = False,
    same: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> None:
    """Bring the frozen base of a network to a device and dtype, in the memory of another where the numbers are equal.

    It goes tensor by tensor, so that at most one tensor is there twice.

    Args:
        net: A network with adapters. It is changed in place; networks that share its base are not.
        other: The same network, with adapters or without, such as the frozen teacher.
        dtype: The dtype in which the network computes.
        device: Where it computes; None for where it is.
        autocast: Whether it computes under autocast. Then the base holds what autocast rounds to bfloat16 at every
            call, which gives the same bits.
        same: Whether two tensors of one shape, dtype and device have the same numbers.
    """
    theirs = {name: tensor for name, _, tensor in _base(other)}
    for name, layer, tensor in _base(net):
        rounded = torch.bfloat16 if autocast and isinstance(layer, ROUNDED) else dtype
        own = tensor.detach().to(device or tensor.device, rounded if tensor.is_floating_point() else tensor.dtype)
        there = theirs.get(name)
        if there is not None and _alike(there) == _alike(own) and same(there, own):
            own = there.detach()
        tensor.data = own


def _base(net: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield each tensor of a network but the adapters, with its layer, and its name in the network without adapters."""
    for place, layer in net.named_modules():
        if "lora_" not in place:
            for name, tensor in chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)):
                yield f"{place}.{name}".replace(".base_layer", ""), layer, tensor


def _alike(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _in_place(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return what ``deepcopy`` takes for tensors that are not copied: other tensors that read the same memory."""
    return {
        id(tensor): nn.Parameter(tensor.detach(), False) if isinstance(tensor, nn.Parameter) else tensor.detach()
        for tensor in tensors
    }


def fresh_adapters(net: nn.Module) -> nn.Module:
    """Return a network with other adapters on the same frozen base. They are float32 and start at zero."""
    from peft.tuners.lora import LoraLayer

    fresh = own_copy(net)
    layers: list[Any] = [layer for layer in fresh.modules() if isinstance(layer, LoraLayer)]
    with with_seed(0, next(net.parameters()).device), torch.no_grad():
        for layer in layers:
            layer.reset_lora_parameters("default", True)
    for name, weight in fresh.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    return fresh


def train_all_or_adapters(net: nn.Module) -> None:
    """Let a network's weights be trained: all of them, or the adapters alone where it holds any."""
    adapted = has_lora(net)
    for name, weight in net.named_parameters():
        weight.requires_grad_(not adapted or "lora_" in name)
