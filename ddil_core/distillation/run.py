"""A distillation run: what all of its stages share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import NetworkDenoiser
from ddil_core.diffusion.parameterization import Reflection, calibrate_reflection
from ddil_core.distillation.autocast import rounded_for_autocast
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.sharding import shard
from ddil_core.distillation.student import Student
from ddil_core.models.compiling import compile_module
from ddil_core.models.model import Model
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import broken_weight

C = TypeVar("C", bound=MethodConfig)


@dataclass
class Run(Generic[C]):
    """A distillation under way. Each method's ``train`` takes one and returns the student.

    Attributes:
        model: The teacher. A method may replace it, as the conversion to v does.
        pool: The encoded training data.
        config: The configuration of the method.
        data: The reference of the data set.
        out: The run folder.
        accelerator: The device and the processes.
    """

    model: Model
    pool: LatentPool
    config: C
    data: str
    out: Path
    accelerator: Accelerator

    @cached_property
    def reflection(self) -> Reflection:
        """The reflection of the teacher's x̂, calibrated on the encoded data, on the device."""
        settings = self.config.reflection
        return calibrate_reflection(self.pool.mean, settings.mode, settings.quantile).to(self.accelerator.device)

    def train(self, train: Callable[[Run[C]], Student]) -> Student:
        """Train a student by a method, with float32 products as the configuration says."""
        with self.config.compute.precision():
            return train(self)

    def frozen(self, net: nn.Module, *, under_autocast: bool = True) -> NetworkDenoiser:
        """Return a network as a frozen teacher in ``teacher_dtype``.

        ``net`` keeps its own dtype, as the start of a student. ``under_autocast`` says that the teacher is evaluated
        inside ``accelerator.autocast()``; without it, a float32 teacher computes in float32.

        Autocast would round the weights of a frozen network again at every call. A float32 teacher of a run in mixed
        precision therefore holds what autocast rounds in bfloat16 already, which gives the same bits. A bfloat16
        teacher is evaluated without autocast.

        Raises:
            DdilError: the network holds weights that are not finite.
        """
        if (broken := broken_weight(net)) is not None:
            raise DdilError(
                f"the teacher {self.model.reference!r} holds weights that are not finite, first in {broken}; fetch "
                "or make it again"
            )
        dtype, teacher = getattr(torch, self.config.teacher_dtype), net
        mixed, device = under_autocast and self.config.mixed_precision == "bf16", self.accelerator.device
        sharded = self.config.shard and self.accelerator.num_processes > 1
        if mixed or sharded or dtype != torch.float32:
            teacher = copy.deepcopy(net)
            teacher = rounded_for_autocast(teacher) if mixed and dtype == torch.float32 else teacher.to(dtype)
            net.to("cpu")  # until a student starts from it
        like = self.model.denoiser
        denoiser = type(like)(teacher.eval().requires_grad_(False), like.schedule, like.prediction).to(device)
        if sharded:
            shard(denoiser.net)
        if mixed and dtype != torch.float32:
            plain = torch.autocast(device.type, enabled=False)
            denoiser.output = plain(denoiser.output)  # type: ignore[method-assign]
        if self.config.compile:
            compile_module(denoiser.net, device, static=False)
        return denoiser
