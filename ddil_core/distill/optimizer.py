"""Optimisers of the distillers, and what a checkpoint holds of a network of which only a part is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddil_core.distill.config import MethodConfig
from ddil_core.errors import WrongCommand
from ddil_core.train import Stateful


def make_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float, config: MethodConfig) -> Any:
    """AdamW, plain, fused, or with moments of 8 bits, on the parameters that want a gradient.

    Raises:
        WrongCommand: the optimiser's package is not installed.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    told: dict[str, Any] = {"lr": learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise WrongCommand(
                "optimizer '8bit' needs the package bitsandbytes, which is not installed: pip install bitsandbytes, or say "
                "--set optimizer=fused"
            ) from error
        return AdamW8bit(trained, **told)
    return torch.optim.AdamW(trained, **told, fused=True if config.optimizer == "fused" else None)


def trained(net: nn.Module) -> Stateful:
    """The network for a checkpoint: all of it, or its trained weights alone where the others are frozen."""
    frozen = any(not parameter.requires_grad for parameter in net.parameters())
    return TrainedPart(net) if frozen else net


@dataclass(frozen=True)
class TrainedPart:
    """The weights of a network that want a gradient."""

    net: nn.Module

    def state_dict(self) -> dict[str, Any]:
        return {name: p.detach() for name, p in self.net.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        own = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        if own.keys() != state_dict.keys():
            raise ValueError("the weights are those of another network")
        for name, parameter in own.items():
            parameter.copy_(state_dict[name])
