"""What the parts of a stage share: its data, its configuration, its processes and its random streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, Denoiser
from ddil_core.diffusion.noise import generator_for
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.sharding import whole
from ddil_core.distillation.steady import steady
from ddil_core.support.devices import sent
from ddil_core.support.finite import Finite

DATA, COLLECTION, LOSS, ROUNDING = range(4)
"""Purposes of random numbers. Each purpose has its own stream in every update."""


@dataclass
class StageContext:
    """The surroundings of a stage. The stage, its state source and its labeler share one context.

    Attributes:
        pool: The encoded training data.
        config: The configuration of the method.
        accelerator: The device and the processes of the run.
        index: The number or name of the stage. It is part of every random seed.
        finite: Remembers whether all outputs of the teacher were finite.
        batch: The number of the batch that is drawn now. A stream's rows depend on it.
        rolled: The networks that rollouts and labels evaluate, of which each process may take other numbers of rows.
    """

    pool: LatentPool
    config: MethodConfig
    accelerator: Accelerator
    index: int | str
    finite: Finite[str] = field(default_factory=Finite)
    batch: int = 0
    rolled: Sequence[nn.Module] = ()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """Return a CPU generator for one update and one purpose (see ``stage_generator``)."""
        return stage_generator(self.config.seed, self.index, step, purpose)

    def condition(self, row: Tensor) -> Condition:
        """Return the condition of the pool's rows int64 [B], float32, on the device.

        It goes to the device in the pool's float16, without waiting for the device.
        """
        return Condition({name: sent(rows, self.device).float() for name, rows in self.pool.conditions(row).items()})

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which processes that divide the networks may evaluate different numbers of rows."""
        return whole(self.rolled)

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw random rows of the pool for rollouts of the batch that is drawn now, int64 [count]."""
        return self.pool.rows(count, generator, self.batch)

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw standard normal latents [count, C, H, W], on the host. ``sent`` brings them to the device."""
        return torch.randn((count, *self.pool.mean.shape[1:]), generator=generator)

    def steady(self, denoiser: Denoiser) -> Denoiser:
        """Return a denoiser for evaluations without gradients, which on a GPU evaluates few sizes of batches."""
        return steady(denoiser, self.device, self.config.teacher_batch_size)


def stage_generator(seed: int, index: int | str, step: int, purpose: int) -> torch.Generator:
    """Return a CPU generator for one update of a stage and one purpose. It is the same in every process.

    Args:
        seed: The seed of the run.
        index: The number or name of the stage.
        step: The update.
        purpose: ``DATA``, ``COLLECTION``, ``LOSS`` or ``ROUNDING``.
    """
    return generator_for(seed, "distill", index, step, purpose)
