"""What autocast rounds to bfloat16. A frozen network holds it rounded, so that no call rounds it again."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

ROUNDED = (nn.Linear, _ConvNd)
"""The layers whose weights and biases autocast rounds to bfloat16 at every call."""


def rounded_for_autocast(net: nn.Module) -> nn.Module:
    """Round the weights of linear layers and convolutions to bfloat16, as autocast rounds them at every call."""
    for layer in net.modules():
        if isinstance(layer, ROUNDED):
            layer.to(torch.bfloat16)
    return net
