"""Networks that the processes divide among them: FSDP2, torch's ``fully_shard`` (Zhao et al., 2304.11277).

Each process holds a share of every weight, of its gradient, of the optimiser's moments and of the average. A block's
weights are gathered when the block computes. Where processes evaluate different numbers of rows, as in rollouts, the
networks are gathered whole before (``whole``), because a gathering needs all processes.

A checkpoint holds whole weights and moments, as that of a run that divides nothing. So one process can read it, and a
run goes on with any number of processes, divided or not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ddil_core.distillation.optimizer import LARGEST, TrainedWeights
from ddil_core.support import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of AdamW's moments in its state."""


@cache
def _mesh(kind: str) -> DeviceMesh:
    return init_device_mesh(kind, (ranks.world(),))


def shard(net: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Divide a network's weights over all processes, in place, block by block.

    Args:
        net: The network, on its device. diffusers says which of its blocks belong together.
        dtype: What weights are rounded to when they are gathered; None for their own dtype. Gradients are averaged in
            float32.
    """
    if not any(True for _ in net.parameters()):  # a formula
        return net
    mesh = _mesh(next(net.parameters()).device.type)
    policy = MixedPrecisionPolicy()
    if dtype is not None:  # a denoiser casts its inputs itself: times stay exact
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for module in net.modules():
            vars(module)["compute_dtype"] = dtype
    blocks = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in [*net.modules()][:0:-1]:  # inner blocks first, and the network itself last
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    with whole([net]):  # afterwards the shards stay where they are
        pass
    return net


@contextmanager
def whole(nets: Iterable[nn.Module]) -> Iterator[None]:
    """Gather the weights of divided networks for the context, without gradients. All processes enter and leave it.

    Other networks are left as they are.
    """
    modules = [module for net in nets for module in net.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    yield
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a divided tensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def joined(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """Return a divided tensor whole, on the host, or empty where a process does not ``keep`` it.

    All processes call this. Any other tensor is returned itself.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else full.new_empty(0)


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return what this process holds of a whole tensor that is divided as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    divided = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return divided.to_local()


def whole_state(net: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the state of a network, whole. All processes call this where the network is divided (``joined``)."""
    return {name: joined(tensor, keep=keep) for name, tensor in net.state_dict().items()}


@torch.no_grad()
def load_whole(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state into a network, divided or not.

    Raises:
        ValueError: the state is that of another network.
    """
    current = net.state_dict()
    if current.keys() != state.keys():
        raise ValueError("the weights are those of another network")
    for name, tensor in current.items():
        local(tensor).copy_(own_part(state[name], tensor))


class ShardedWeights(TrainedWeights):
    """The trained weights of a network that is divided: this process's shares, float32.

    The network gathers them rounded to its dtype. With ``offload`` they lie on the host beside the network's own.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype, *, offload: bool = False) -> None:
        """Divide a float32 network in place. For the arguments see ``TrainedWeights``."""
        self.plan = without_weights(net)
        self.net = shard(net, None if dtype == torch.float32 else dtype)
        self.trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        self.frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
        self.apart, self.offload = True, offload  # gradients are added up outside of the network
        own = {name: local(parameter.detach()) for name, parameter in self.trained.items()}
        self.weights = {name: nn.Parameter(part.cpu() if offload else part) for name, part in own.items()}

    @torch.no_grad()
    def take_gradients(self) -> None:
        for name, weight in self.weights.items():
            gradient = self.trained[name].grad
            if gradient is not None:
                part = local(gradient).to(weight)
                weight.grad = part if weight.grad is None else weight.grad.add_(part)
                self.trained[name].grad = None

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum().to(self._device)
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))
        return norm

    @torch.no_grad()
    def ruined(self) -> str | None:
        largest = torch.stack([_largest(weight) for weight in self.parameters()]).float().to(self._device)
        broken = (~(largest <= LARGEST)).int()
        torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        return [*self.weights][int(broken.argmax())] if bool(broken.any()) else None

    @torch.no_grad()
    def give_weights(self) -> None:
        for name, weight in self.weights.items() if self.offload else ():
            local(self.trained[name]).copy_(weight)

    def network(self) -> nn.Module:
        self.give_weights()
        return whole_copy(self.plan, self.net)

    def state_dict(self) -> dict[str, Any]:
        self.give_weights()
        state = whole_state(self.net, keep=ranks.is_main())  # which writes the checkpoint
        return {name: tensor for name, tensor in state.items() if name not in self.frozen}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        frozen = {name: tensor for name, tensor in self.net.state_dict().items() if name in self.frozen}
        if {**state_dict, **frozen}.keys() != self.net.state_dict().keys():
            raise ValueError("the weights are those of another network")
        for name, tensor in self.net.state_dict().items():
            if name not in frozen:
                local(tensor).copy_(own_part(state_dict[name], tensor))
        for name, weight in self.weights.items():
            weight.copy_(local(self.trained[name]))

    @property
    def _device(self) -> torch.device:
        return next(iter(self.trained.values())).device


def _largest(weight: Tensor) -> Tensor:
    """Return the largest size of a number of a share, which may be empty."""
    return weight.abs().max() if weight.numel() else weight.new_zeros(())


def without_weights(net: nn.Module) -> nn.Module:
    """Return a copy of a network on the host whose parameters have shapes alone."""
    shapes = {id(weight): nn.Parameter(weight.detach().to("meta"), weight.requires_grad) for weight in net.parameters()}
    copied = copy.deepcopy(net, shapes)  # which copies no weight
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.cpu()
    return copied


def whole_copy(plan: nn.Module, net: nn.Module) -> nn.Module:
    """Return a divided network whole, on the host. ``plan`` is the network ``without_weights``."""
    copied = copy.deepcopy(plan)
    copied.load_state_dict({name: tensor.cpu() for name, tensor in whole_state(net).items()}, assign=True)
    return copied


class ShardedMoments:
    """The state of an optimiser of ``ShardedWeights``, whole in a checkpoint."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: ShardedWeights) -> None:
        self.optimizer, self.trained = optimizer, [*weights.trained.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state. All processes call this."""
        state = self.optimizer.state_dict()
        moments = {place: self._mapped(place, held, self._joined) for place, held in state["state"].items()}
        return state | {"state": moments}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        moments = {place: self._mapped(place, held, own_part) for place, held in state_dict["state"].items()}
        self.optimizer.load_state_dict(state_dict | {"state": moments})

    def _mapped(self, place: int, held: Mapping[str, Any], change: Any) -> dict[str, Any]:
        return {name: change(value, self.trained[place]) if name in MOMENTS else value for name, value in held.items()}

    def _joined(self, share: Tensor, like: DTensor) -> Tensor:
        divided = DTensor.from_local(
            share.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return joined(divided, keep=ranks.is_main())
