"""Low-rank adapters (LoRA: Hu et al., 2106.09685): students that train small matrices beside a frozen base.

A network that holds adapters is the base with PEFT's layers in it. Several such networks can share one base in memory:
each has adapters of its own, and the frozen weights are the same tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

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
    """Return a copy of a network with adapters that start at zero. Their first weights are the same in every run."""
    import peft

    adapted: Any = copy.deepcopy(net)
    targets = lora.targets or TARGETS["unet" if hasattr(net, "down_blocks") else "transformer"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted.add_adapter(peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(targets)))
    return adapted


def has_lora(net: nn.Module) -> bool:
    """Return whether a network holds adapters."""
    return hasattr(net, "peft_config")


def own_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a network. A network with adapters shares its frozen base with the copy."""
    return copy.deepcopy(net, {id(weight): weight for weight in _base(net)} if has_lora(net) else None)


def _base(net: nn.Module) -> list[torch.Tensor]:
    return [*(weight for name, weight in net.named_parameters() if "lora_" not in name), *net.buffers()]


def fresh_adapters(net: nn.Module) -> nn.Module:
    """Return a network with other adapters on the same frozen base. They are float32 and start at zero."""
    from peft.tuners.lora import LoraLayer

    fresh = own_copy(net)
    layers: list[Any] = [layer for layer in fresh.modules() if isinstance(layer, LoraLayer)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
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
