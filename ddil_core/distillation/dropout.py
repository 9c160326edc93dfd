"""How networks are evaluated that are not being trained: in evaluation mode, and a bounded number of states at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ddil_core.diffusion.noise import generator_for


@contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode, so that dropout is off; afterwards every module has the mode that it had before."""
    before = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def slices(count: int, size: int) -> list[slice]:
    """Consecutive parts of ``count`` rows, each of at most ``size``."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@contextmanager
def seeded(device: torch.device, *key: object) -> Iterator[None]:
    """Seed torch's global generators, from which dropout draws, by a key; afterwards they go on from where they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator_for(*key).initial_seed())
        yield
