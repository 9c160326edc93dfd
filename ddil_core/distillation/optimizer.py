"""Optimisers of the distillers, and the trained weights, which are float32 whatever the dtype of the network is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.distillation.config import MethodConfig
from ddil_core.support.errors import WrongCommand


def make_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, config: MethodConfig
) -> torch.optim.Optimizer:
    """Return AdamW on the parameters that require a gradient: fused, plain, or with moments of 8 bits."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options: dict[str, Any] = {"lr": learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer
    if config.optimizer == "8bit":
        optimizer = adamw_8bit()(trained, **options)
    else:
        optimizer = torch.optim.AdamW(trained, **options, fused=True if config.optimizer == "fused" else None)
    return optimizer


def require_optimizer(config: MethodConfig) -> None:
    """Refuse an optimiser whose package is not installed.

    Raises:
        WrongCommand: bitsandbytes is not installed, and the optimiser is "8bit".
    """
    if config.optimizer == "8bit":
        adamw_8bit()


def adamw_8bit() -> Any:
    """Return the class of AdamW with moments of 8 bits. Raises WrongCommand: its package is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise WrongCommand(
            "optimizer '8bit' needs the package bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or say --set optimizer=fused"
        ) from error
    return AdamW8bit


def step_unless(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Do an optimiser's step, unless ``skipped`` (a number on the device) is 1.

    Fused AdamW reads ``skipped`` on the device, as it reads the overflows of a gradient scaler, so that nobody waits
    for a GPU. The other optimisers wait for it.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # the accelerator's wrapper holds the optimiser
    if inner.defaults.get("fused"):
        inner.found_inf = skipped.to(inner.param_groups[0]["params"][0].device)
        optimizer.step()
    elif not bool(skipped):
        optimizer.step()


LARGEST = 65_504.0
"""The largest trained weight, which is the largest number of float16. No network with a larger one can be used."""


class TrainedWeights:
    """The trained weights of a network, float32.

    The optimiser changes them, the average follows them, checkpoints hold them.

    A step of 1e-6 is smaller than half the spacing of bfloat16 at almost every weight (2⁻⁹ of the weight). A weight
    in bfloat16 would never change. So a network in bfloat16 has its weights twice: these, and its own, which are these
    rounded. Weights on the host are apart from the network's too. A float32 network on the same device has these
    weights alone, and nothing is copied.

    Attributes:
        apart: Whether the network has its weights twice.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype, *, offload: bool = False) -> None:
        """Take over the trained weights of a network.

        Args:
            net: A network, which is converted in place. Its parameters that require a gradient are trained. They are
                float32.
            dtype: The dtype of the network afterwards.
            offload: Keep the trained weights on the host, where the optimiser then works.
        """
        self.net = net
        self.trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        self.frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
        self.apart = offload or dtype != torch.float32
        self.weights = self.trained
        if self.apart:
            self.weights = {
                name: nn.Parameter(parameter.detach().to("cpu" if offload else parameter.device, copy=True))
                for name, parameter in self.trained.items()
            }
        if dtype != torch.float32:  # a frozen base may be rounded already
            net.to(dtype)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.weights.values())

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the network's gradients to the gradients of the weights, and clear the network's."""
        if self.apart:
            for name, weight in self.weights.items():
                gradient = self.trained[name].grad
                if gradient is not None:
                    # A copy, because the network's may lie in a buffer that is used again.
                    gradient = gradient.to(weight, copy=weight.grad is None)
                    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
                    self.trained[name].grad = None

    def clip(self, limit: float) -> Tensor:
        """Shorten the gradient to a norm of at most ``limit``. Return the norm before."""
        return nn.utils.clip_grad_norm_(self.parameters(), limit)

    @torch.no_grad()
    def ruined(self) -> str | None:
        """Return the name of the first weight that is not finite or above ``LARGEST``, or None. This waits once."""
        largest = torch.stack(torch._foreach_norm([*self.weights.values()], math.inf)).float()
        broken = ~(largest <= LARGEST)  # NaN is not below either
        return [*self.weights][int(broken.int().argmax())] if bool(broken.any()) else None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Copy the weights into the network, rounded to its dtype."""
        if self.apart:
            torch._foreach_copy_(list(self.trained.values()), list(self.weights.values()))

    def network(self) -> nn.Module:
        """Return a float32 copy of the network with these weights, not rounded."""
        copied = copy.deepcopy(self.net).float()
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # accelerate's autocast
            copied.__dict__.pop(name, None)
        copied.load_state_dict(self.state_dict(), strict=False)  # the state holds no frozen weights
        return copied

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the network without its frozen weights."""
        state = {name: tensor for name, tensor in self.net.state_dict().items() if name not in self.frozen}
        return state | {name: weight.detach() for name, weight in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        current = self.state_dict()
        if current.keys() != state_dict.keys():
            raise ValueError("the weights are those of another network")
        for name, tensor in current.items():
            tensor.copy_(state_dict[name])
        self.give_weights()
