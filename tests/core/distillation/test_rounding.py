"""What the docs promise of runs that add up the same gradients in another order, as parts and processes do."""

from __future__ import annotations

import pytest
import torch

from ddil_core.data.pool import LatentPool
from ddil_core.models.model import Model
from tests.core.closed_form import distance
from tests.core.distillation.test_dropout import make


@pytest.mark.parametrize("kind", ["pd", "lcm", "dmd2"])
def test_a_gradient_is_that_of_its_parts_and_an_update_repeats_bit_for_bit(
    model: Model, pool: LatentPool, kind: str
) -> None:
    """The first gradients agree within rounding.

    How far the weights are apart later ``benchmarks.rounding`` measures.
    """
    moved, norms = list[torch.Tensor](), list[float]()
    for parts in (1, 4, 1):
        trainer = make(kind, model, pool, gradient_accumulation=parts, learning_rate=5e-4)
        start = torch.cat([p.detach().flatten() for p in trainer.net.parameters()])
        norms.append(float(trainer.update(0)["gradient_norm"]))
        moved.append(torch.cat([p.detach().flatten() for p in trainer.net.parameters()]) - start)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    # Adam's first step is the gradient's sign, also where the gradient is nothing but rounding.
    assert 0 < distance(moved[1], moved[0]) < 0.05
    assert norms[2] == norms[0] and torch.equal(moved[2], moved[0])
