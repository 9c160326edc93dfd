"""Batches of few shapes: a denoiser that fills its rows up before it evaluates its network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import Condition, Denoiser

SIZES = 8
"""How many different sizes batches up to ``teacher_batch_size`` have."""


class Steady:
    """Evaluates a denoiser on a multiple of ``rows`` rows. The rows that fill a batch up repeat its first row.

    The rollouts of a distillation take ever other numbers of rows. A GPU that has seen a shape before does not choose
    its kernels again, and a compiled network is not compiled again. With eight sizes, filling costs a sixteenth of a
    batch on the mean, and only in the last batch of a transition.
    """

    def __init__(self, denoiser: Denoiser, rows: int) -> None:
        self.denoiser, self.rows = denoiser, rows
        self.schedule, self.nfe = denoiser.schedule, denoiser.nfe

    @property
    def network(self) -> Any:
        """The network, which messages about it name."""
        return getattr(self.denoiser, "network", self.denoiser)

    @property
    def reads_end(self) -> bool:
        return bool(getattr(self.denoiser, "reads_end", False))

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        missing = -len(z) % self.rows
        if not missing:
            return self.denoiser(z, t, condition)

        def filled(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])

        tensors = {name: filled(tensor) for name, tensor in condition.tensors.items()}
        guidance = None if condition.guidance is None else filled(condition.guidance)
        whole = replace(condition, tensors=tensors, guidance=guidance)
        return self.denoiser(filled(z), filled(t), whole)[: len(z)]


def steady(denoiser: Denoiser, device: torch.device, teacher_batch_size: int) -> Denoiser:
    """Return a denoiser that evaluates few sizes of batches on a GPU. On a CPU filling only costs."""
    return Steady(denoiser, max(1, teacher_batch_size // SIZES)) if device.type == "cuda" else denoiser
