"""The memory that a distillation takes on a device, component by component, before any weight is loaded.

The networks are built of fake tensors, which have shapes and no numbers. The estimate then does what an update does,
and counts the bytes that are alive. So activations are those of the network's own code, with gradient checkpointing and
mixed precision as the configuration says. It leaves out the memory that kernels take for themselves and the libraries
of a device; ``USABLE`` is what remains for the rest.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ddil_core.diffusion.denoiser import Condition, NetworkDenoiser
from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.adapters import take_base, train_all_or_adapters, with_lora
from ddil_core.distillation.autocast import rounded_for_autocast
from ddil_core.distillation.config import MethodConfig, ProgressiveConfig
from ddil_core.distillation.consistency import student_network
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.critic import Critic
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.models.network_shapes import NetworkShape
from ddil_core.support.live_bytes import LiveBytes

SIZES = (24, 48, 80)
"""The memory of the GPUs that are asked about, in GiB."""
USABLE = 0.95
"""The share of a GPU's memory that an estimate may take. The driver and the kernels' own memory take the rest."""

DIVIDED = ("teacher", "student", "critic", "average", "gradients", "optimizer", "float32 weights")
"""The components that processes divide with ``shard``."""

ADAMW, ADAMW_8BIT, SCALE, BLOCK, LEAST = 8, 2, 4, 256, 4096
"""Bytes of AdamW's two moments for a weight, in float32 and in 8 bits; and in bitsandbytes the bytes of a scale, the
numbers that share one, and the fewest numbers of a tensor whose moments have 8 bits."""


@dataclass(frozen=True)
class Plan:
    """The memory of a distillation.

    Attributes:
        device: The bytes of each component at the peak of an update, on each GPU. ``activations`` are what an update
            takes beside the gradients.
        host: The bytes of each component that waits in the machine's memory, for each process.
        parameters: The number of parameters of the teacher's network.
    """

    device: dict[str, int]
    host: dict[str, int]
    parameters: int

    @property
    def total(self) -> int:
        """The bytes on each GPU."""
        return sum(self.device.values())

    def fits(self, gib: int) -> bool:
        """Whether a GPU of ``gib`` GiB suffices."""
        return self.total <= USABLE * gib * 2**30


def plan_memory(shape: NetworkShape, config: MethodConfig, nfe: int = 2, processes: int = 1) -> Plan:
    """Estimate the memory of a distillation.

    Args:
        shape: The teacher's network.
        config: The configuration of the method.
        nfe: How many rows a guided teacher evaluates for each state: 2, or 1 without guidance.
        processes: The number of processes, which divide the batch.
    """
    update = _Update(shape, config, nfe, processes)
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")  # of kernels, about speed: none runs
        return update.plan()


class _Update:
    """An update on fake tensors, phase by phase."""

    def __init__(self, shape: NetworkShape, config: MethodConfig, nfe: int, processes: int) -> None:
        self.shape, self.config, self.nfe, self.processes = shape, config, nfe, processes
        self.rows = max(1, config.batch_size // processes // config.gradient_accumulation)
        self.mixed = config.mixed_precision == "bf16"
        self.embedding = getattr(config, "w_embedding", None)
        self.average: nn.Module | None = None
        self.critic: nn.Module | None = None
        with torch.device("meta"):
            net = shape.build()
            self.teacher = self._frozen(net)
            lora = getattr(config, "lora", None)
            adapted = net if lora is None else with_lora(net, lora)
            start = student_network(net, config) if isinstance(config, ConsistencyConfig) else adapted
            self.student = self._trained(copy.deepcopy(start))
            if config.ema_decay and not self.lora:
                self.average = copy.deepcopy(start).requires_grad_(False)
            if isinstance(config, MatchingConfig):
                latent_size = None if config.gan is None else shape.latent[1:]
                self.critic = self._trained(Critic(self._denoiser(copy.deepcopy(adapted)), latent_size))

    @property
    def lora(self) -> bool:
        return getattr(self.config, "lora", None) is not None

    @property
    def sharded(self) -> bool:
        return self.config.shard and self.processes > 1

    def _share_base(self) -> None:
        """Give adapters their frozen base, in the memory of the teacher's where it has its numbers (``Stage.beside``).

        The teacher of a later stage of progressive distillation holds a LoRA in its weights.
        """
        dtype = getattr(torch, self.config.student_dtype)
        later = isinstance(self.config, ProgressiveConfig) and len(self.config.stages) > 1
        take_base(self.student, self.teacher, dtype, autocast=self.mixed, same=lambda *_: not later)
        if isinstance(self.critic, Critic):
            take_base(self.critic.denoiser.net, self.student, dtype, autocast=self.mixed, same=lambda *_: True)

    def _frozen(self, net: nn.Module) -> nn.Module:
        """Return the teacher, as ``Run.frozen`` makes it."""
        dtype = getattr(torch, self.config.teacher_dtype)
        net = copy.deepcopy(net).eval().requires_grad_(False)
        if self.mixed and dtype == torch.float32:
            return rounded_for_autocast(net)
        return net.to(dtype)

    def _trained(self, net: nn.Module) -> nn.Module:
        """Return a network as ``Stage`` makes it."""
        train_all_or_adapters(net.denoiser.net if isinstance(net, Critic) else net)
        if self.config.gradient_checkpointing:
            checkpointed: Any = net
            checkpointed.enable_gradient_checkpointing()
        return net.train().to(getattr(torch, self.config.student_dtype))

    def _denoiser(self, net: nn.Module) -> NetworkDenoiser:
        return self.shape.denoiser(net, Schedule.stable_diffusion(), "epsilon")  # the memory depends on neither

    def plan(self) -> Plan:
        """Return the memory of each component. It is called where tensors are fake."""
        for net in (self.teacher, self.student, self.average, self.critic):
            if net is not None:
                give_memory(net)
                if self.mixed:
                    norms_as_on_a_gpu(net)
        if self.lora and not self.sharded:
            self._share_base()
        trained = [weight for net in (self.student, self.critic) for weight in trained_weights(net)]
        gradients, activations = self._transient()
        device = {"teacher": nbytes(self.teacher), "student": nbytes(self.student, beside=(self.teacher,))}
        host = dict[str, int]()
        if self.lora and self.config.teacher_dtype == "float32" and not self.mixed:
            # The adapters' first values; with a rounded teacher they wait on the host.
            device["student"] += sum(4 * weight.numel() for weight in trained_weights(self.student))
        if self.critic is not None:
            device["critic"] = nbytes(self.critic, beside=(self.teacher, self.student))
        there = host if self.config.offload else device
        if self.config.offload or self.config.student_dtype != "float32":
            there["float32 weights"] = sum(4 * weight.numel() for weight in trained)
        there["optimizer"] = sum(moment_bytes(weight, self.config.optimizer) for weight in trained)
        if self.average is not None:
            evaluated = isinstance(self.config, ConsistencyConfig)
            (device if evaluated else there)["average"] = sum(
                4 * weight.numel() for weight in self.average.parameters()
            )
        there["autoencoder"] = 4 * self.shape.autoencoder
        if self.config.ddil is not None:
            states = 1 if isinstance(self.config, MatchingConfig) else 2  # the others keep the teacher's targets
            device["aggregated dataset"] = self.config.ddil.capacity * states * 4 * self._numbers
        device |= {"gradients": gradients, "activations": activations}
        parameters = sum(parameter.numel() for parameter in self.teacher.parameters())
        if self.sharded:
            return Plan(self._divided(device), self._divided(host), parameters)
        return Plan(device, host, parameters)

    def _divided(self, parts: dict[str, int]) -> dict[str, int]:
        """Return what a process holds where all divide the networks. Rollouts gather teacher and student whole."""
        shares = {name: part // self.processes if name in DIVIDED else part for name, part in parts.items()}
        gathered = parts["teacher"] + parts["student"] if "teacher" in parts else 0
        return shares | ({"gathered for rollouts": gathered} if gathered else {})

    @property
    def _numbers(self) -> int:
        channels, height, width = self.shape.latent
        return channels * height * width

    def _transient(self) -> tuple[int, int]:
        """Return the bytes of gradients and of the rest at the peak of the phase that takes most.

        Processes keep the gradients of each network between updates, in the buffers that they exchange.
        """
        kept = self.processes > 1
        phases = list(self._phases())
        found = [(self._gradient_bytes(net), self._peak(net, run, kept)) for net, run in phases]
        if kept:
            trained = [net for net in (self.student, self.critic) if net is not None]
            return sum(map(self._gradient_bytes, trained)), max(peak for _, peak in found)
        gradients, peak = max(found, key=lambda phase: phase[1])
        return min(gradients, peak), max(0, peak - gradients)

    def _peak(self, net: nn.Module | None, run: Callable[[], None], kept: bool) -> int:
        """Return the most bytes beside the networks in a phase, with the gradients of ``net`` unless they are kept."""
        present = [*self._tensors()]
        trained, handed = trained_weights(net), list[Tensor]()
        apart = self.config.student_dtype != "float32" and not self.config.offload
        for weight in trained if kept else ():
            weight.grad = torch.zeros_like(weight)
            present.append(weight.grad)
        with LiveBytes(present) as live:
            held = self._held_conditions() if trained else []
            for _ in range(min(2, self.config.gradient_accumulation)):
                run()
                for weight in trained if apart and not handed else ():  # see ``TrainedWeights.take_gradients``
                    handed.append(torch.zeros(weight.shape))
                    weight.grad = None
        del held
        for weight in trained:
            weight.grad = None
        return live.peak

    def _held_conditions(self) -> list[dict[str, Tensor]]:
        """Return the conditions that are there while a network learns, beside those of its batch.

        A guided teacher keeps what it read last, so that the steps of a trajectory need not prepare it again. An update
        with a critic has another batch.
        """
        read = min(self.rows, self.config.teacher_batch_size)
        other = [] if self.critic is None else [self.rows]
        return [self.shape.conditions(rows) for rows in (*other, read, read * self.nfe)]

    def _gradient_bytes(self, net: nn.Module | None) -> int:
        """Return the bytes of a network's gradients on the device: float32, or on the way to the host as it is."""
        return sum(weight.nbytes if self.config.offload else 4 * weight.numel() for weight in trained_weights(net))

    def _tensors(self) -> Iterator[Tensor]:
        for net in (self.teacher, self.student, self.average, self.critic):
            if net is not None:
                yield from (*net.parameters(), *net.buffers())

    def _phases(self) -> Iterator[tuple[nn.Module | None, Callable[[], None]]]:
        """Yield the phases of an update: the network that is trained, or None, and what is done.

        The student's own rollouts take no more than the guided teacher's.
        """
        labelled = self.config.teacher_batch_size
        if self.critic is None:
            yield None, partial(self._evaluate, self.teacher, labelled * self.nfe)
            if self.average is not None and isinstance(self.config, ConsistencyConfig):
                yield None, partial(self._evaluate, self.average, min(labelled, self.rows))
            yield self.student, self._regress
        else:
            if self.config.ddil is not None:
                yield None, partial(self._evaluate, self.teacher, labelled * self.nfe)
            yield self.student, self._generate
            yield self.critic, self._criticise

    def _inputs(self, net: nn.Module, rows: int) -> tuple[Tensor, Tensor, Condition]:
        conditions = self.shape.conditions(rows)
        if self.embedding is not None and net is not self.teacher:
            conditions["timestep_cond"] = torch.zeros(rows, self.embedding)
        return torch.zeros(rows, *self.shape.latent), torch.zeros(rows, dtype=torch.long), Condition(conditions)

    def _autocast(self, net: nn.Module) -> AbstractContextManager[Any]:
        plain = net is self.teacher and self.config.teacher_dtype != "float32"
        return torch.autocast("cpu", torch.bfloat16) if self.mixed and not plain else nullcontext()

    def _output(self, net: nn.Module, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self._autocast(net):
            return self._denoiser(net).output(z, t, condition)

    @torch.no_grad()
    def _evaluate(self, net: nn.Module, rows: int) -> None:
        self._output(net, *self._inputs(net, rows))

    def _regress(self) -> None:
        """Do a student's update towards a target."""
        z, t, condition = self._inputs(self.student, self.rows)
        (self._output(self.student, z, t, condition) - torch.zeros_like(z)).square().mean().backward()

    def _generate(self) -> None:
        """Do a generator's update: its output, the two scores, and what the discriminator says of it."""
        assert isinstance(self.config, MatchingConfig) and self.critic is not None
        x = self._output(self.student, *self._inputs(self.student, self.rows))
        scored = min(self.rows, self.config.teacher_batch_size)
        self._evaluate(self.teacher, scored * self.nfe)  # the critic's score takes no more
        loss = x.square().mean()
        if self.config.gan is not None and self.config.gan.generator_weight:
            _, t, condition = self._inputs(self.critic, self.rows)
            learning = trained_weights(self.critic)
            for weight in learning:
                weight.requires_grad_(False)
            with self._autocast(self.critic):
                loss = loss + self.critic(x, t, condition)[1].sum()
        else:
            learning = []
        loss.backward()
        for weight in learning:
            weight.requires_grad_(True)

    def _criticise(self) -> None:
        """Do a critic's update: it denoises what is generated, and the discriminator judges it and data."""
        assert isinstance(self.config, MatchingConfig) and self.critic is not None
        z, t, condition = self._inputs(self.critic, self.rows)
        with self._autocast(self.critic):
            output, fake = self.critic(z, t, condition)
            loss = output.square().mean()
            if self.config.gan is not None:
                loss = loss + fake.sum() + self.critic(z, t, condition)[1].sum()
        loss.backward()


def trained_weights(net: nn.Module | None) -> list[nn.Parameter]:
    """Return the parameters of a network that require a gradient."""
    return [] if net is None else [parameter for parameter in net.parameters() if parameter.requires_grad]


def norms_as_on_a_gpu(net: nn.Module) -> None:
    """Compute a network's norms in float32, as autocast does on a GPU. On a CPU, whose rules hold here, it does not."""
    for module in net.modules():
        rounded = any(weight.dtype != torch.float32 for weight in module.parameters(recurse=False))
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and not rounded:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def give_memory(net: nn.Module) -> None:
    """Give a network of the meta device new weights and buffers of the same shapes where it is called."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def nbytes(net: nn.Module, beside: Iterable[nn.Module] = ()) -> int:
    """Return the bytes of a network's weights and buffers that are not in the memory of the networks ``beside`` it."""
    there = {storage for other in beside for storage in storages(other)}
    return sum(size for storage, size in storages(net).items() if storage not in there)


def storages(net: nn.Module) -> dict[int, int]:
    """Return the bytes of each storage of a network's weights and buffers."""
    stored = [tensor.untyped_storage() for tensor in (*net.parameters(), *net.buffers())]
    return {storage._cdata: storage.nbytes() for storage in stored}


def moment_bytes(weight: Tensor, optimizer: str) -> int:
    """Return the bytes of AdamW's two moments of one weight tensor."""
    if optimizer != "8bit" or weight.numel() < LEAST:
        return ADAMW * weight.numel()
    return ADAMW_8BIT * weight.numel() + 2 * SCALE * -(-weight.numel() // BLOCK)
