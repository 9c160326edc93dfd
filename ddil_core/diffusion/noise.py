"""Random numbers of a sample.

They depend on (seed, prompt id, sample index) alone, not on the batch, the device or the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image of a prompt.

    Attributes:
        prompt_id: The prompt's id, or the prompt itself.
        index: The image's number among the images of the prompt, from 0.
    """

    prompt_id: str
    index: int = 0

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        """Return a CPU generator for one purpose: ``noise``, ``decisions`` or ``solver``."""
        return generator_for(seed, self.prompt_id, self.index, purpose)


def generator_for(*key: object) -> torch.Generator:
    """Return the CPU generator of a key. Similar keys give independent streams."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def initial_noise(samples: Sequence[Sample], shape: Sequence[int], seed: int) -> Tensor:
    """Draw z_T ~ N(0, I), float32 [B, *shape] on the CPU."""
    return torch.stack([torch.randn(*shape, generator=sample.generator(seed, "noise")) for sample in samples])


def solver_noise(samples: Sequence[Sample], shape: Sequence[int], seed: int, steps: int) -> Tensor:
    """Draw the noise of all steps of a stochastic solver, float32 [steps, B, *shape] on the CPU."""
    generators = [sample.generator(seed, "solver") for sample in samples]
    drawn = [[torch.randn(*shape, generator=generator) for _ in range(steps)] for generator in generators]
    return torch.stack([torch.stack(of_sample) for of_sample in drawn], dim=1)


def decisions(samples: Sequence[Sample], transitions: int, seed: int) -> Tensor:
    """Draw u ~ U[0, 1), float64 [B, transitions]. The teacher acts at a transition where u < p_teacher.

    Every p_teacher uses the same u (common random numbers). So a larger p_teacher only adds turns of the teacher.
    """
    draws = [torch.rand(transitions, generator=s.generator(seed, "decisions"), dtype=torch.float64) for s in samples]
    return torch.stack(draws)
