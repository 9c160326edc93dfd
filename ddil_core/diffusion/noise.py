"""A sample's randomness comes from (seed, prompt id, sample index) alone: never from the batch, the device or the order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One picture to be made: the ``index``-th of a prompt."""

    prompt_id: str
    index: int = 0

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        """A CPU generator of its own for each purpose (``noise``, ``decisions``, ``solver``)."""
        return generator_for(seed, self.prompt_id, self.index, purpose)


def generator_for(*key: object) -> torch.Generator:
    """A CPU generator for a key, and for this key alone: near keys give streams that have nothing to do with each other."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def initial_noise(samples: Sequence[Sample], shape: Sequence[int], seed: int) -> Tensor:
    """z_T ~ N(0, I), float32 [B, *shape] on the CPU."""
    return torch.stack([torch.randn(*shape, generator=sample.generator(seed, "noise")) for sample in samples])


def decisions(samples: Sequence[Sample], transitions: int, seed: int) -> Tensor:
    """u ~ U[0, 1), float64 [B, transitions]: the teacher acts at a transition where u < p_teacher.

    The same u serve every p_teacher (common random numbers), so that a larger rate only adds teacher's turns.
    """
    draws = [torch.rand(transitions, generator=s.generator(seed, "decisions"), dtype=torch.float64) for s in samples]
    return torch.stack(draws)
