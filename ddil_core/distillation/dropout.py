"""Dropout is off where a network is not trained, and repeatable where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ddil_core.diffusion.noise import generator_for

CPU = torch.device("cpu")


@contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode. Afterwards every module has its earlier mode again."""
    before = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def seeded(device: torch.device, *key: object) -> Iterator[None]:
    """Seed torch's global generators with a key (``with_seed``)."""
    with with_seed(generator_for(*key).initial_seed(), device):
        yield


@contextmanager
def with_seed(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed torch's global generators of the host and of a device. Afterwards they have their earlier state again.

    Dropout draws from them, and so do the first weights of new layers.
    """
    if device.type == "cuda":
        with torch.random.fork_rng(devices=[device]):
            torch.manual_seed(seed)
            yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        yield
