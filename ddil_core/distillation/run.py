"""A distillation run: what its stages share."""

from __future__ import annotations

import copy
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
from ddil_core.distillation.config import MethodConfig
from ddil_core.models.model import Model
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import broken_weight

C = TypeVar("C", bound=MethodConfig)


@dataclass
class Run(Generic[C]):
    """A distillation under way: what its method is given, and how a stage of it is trained."""

    model: Model
    pool: LatentPool
    config: C
    data: str
    out: Path
    accelerator: Accelerator

    @cached_property
    def reflection(self) -> Reflection:
        """Calibrated on the encoded data, on the device."""
        told = self.config.reflection
        return calibrate_reflection(self.pool.mean, told.mode, told.quantile).to(self.accelerator.device)

    def frozen(self, net: nn.Module) -> NetworkDenoiser:
        """A network as a teacher, in the teacher's dtype; the network itself keeps its own, as the start of a student.

        Raises:
            DdilError: it holds weights that are not finite.
        """
        if (broken := broken_weight(net)) is not None:
            raise DdilError(
                f"the teacher {self.model.reference!r} holds weights that are not finite, first in {broken}; fetch or make it again"
            )
        return _frozen(self.model.denoiser, net, self.config).to(self.accelerator.device)


def _frozen(like: NetworkDenoiser, net: nn.Module, config: MethodConfig) -> NetworkDenoiser:
    dtype, copied = getattr(torch, config.teacher_dtype), net
    if dtype != torch.float32:
        copied = copy.deepcopy(net).to(dtype)
        net.to("cpu")  # where it waits for a student to start from it
    return type(like)(copied.eval().requires_grad_(False), like.schedule, like.prediction)
