"""A student in bfloat16 learns as one in float32: its weights are moved, averaged and kept in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.distillation.optimizer import TrainedWeights
from ddil_core.models.model import Model
from tests.core.closed_form import distance, normal
from tests.core.distillation.test_dropout import make

UPDATES = 4


def trained(trainer: Any, name: str = "net") -> dict[str, Tensor]:
    state = trainer.stateful()[name].state_dict()
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The share of the weights that are another number than before."""
    changed = [(before[key] != after[key]).flatten() for key in before]
    return float(torch.cat(changed).float().mean())


@pytest.mark.parametrize(("kind", "rate"), [("pd", 1e-6), ("lcm", 1e-6), ("lcm-lora", 1e-6), ("dmd2", 5e-7)])
def test_as_many_weights_move_as_in_float32(model: Model, pool: LatentPool, kind: str, rate: float) -> None:
    """Those of a generator's critic too."""
    shares: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make(kind, model, pool, ddil=False, learning_rate=rate, student_dtype=dtype)
        names = ["net", "critic"] if kind == "dmd2" else ["net"]
        before = {name: trained(trainer, name) for name in names}
        for step in range(UPDATES):
            trainer.update(step)
        shares[dtype] = [moved(before[name], trained(trainer, name)) for name in names]
    for rounded, whole in zip(shares["bfloat16"], shares["float32"], strict=True):
        assert rounded == pytest.approx(whole, abs=0.02) and whole > 0.3


@pytest.mark.parametrize("kind", ["pd", "lcm", "lcm-lora", "dmd2"])
def test_the_network_is_its_weights_rounded(model: Model, pool: LatentPool, kind: str) -> None:
    trainer = make(kind, model, pool, ddil=False, student_dtype="bfloat16", learning_rate=1e-3)
    trainer.update(0)
    weights = trained(trainer)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    own = dict(trainer.net.named_parameters())
    assert all(torch.equal(own[name], weight.bfloat16()) for name, weight in weights.items())
    assert any(not torch.equal(own[name].float(), weight) for name, weight in weights.items())
    finished = dict(trainer.finish().named_parameters())
    if trainer.ema is None:  # else it is the average, which was fed by them
        assert all(torch.equal(finished[name], weight) for name, weight in weights.items())
    z, t, told = normal(2, 8, 8, 8), torch.tensor([999, 249]), trainer.condition(torch.tensor([0, 1]))
    if kind == "lcm":
        told = trainer.student_condition(torch.tensor([0, 1]), torch.tensor([6.0, 7.0]))
    whole = copy.deepcopy(trainer.net).bfloat16()
    expected = type(trainer.student)(whole, trainer.schedule, trainer.student.prediction)(z, t, told)
    assert torch.equal(trainer.student(z, t, told), expected)


def test_the_average_follows_the_weights_and_not_what_they_are_rounded_to(model: Model, pool: LatentPool) -> None:
    trainer = make("lcm", model, pool, ddil=False, student_dtype="bfloat16", learning_rate=1e-3)
    start = trained(trainer)
    trainer.update(0)
    average = dict(trainer.ema.module.named_parameters())
    for name, weight in trained(trainer).items():
        assert torch.allclose(average[name], 0.95 * start[name] + 0.05 * weight, rtol=1e-6, atol=1e-8)


def test_gradients_of_parts_are_added_up_in_float32(model: Model, pool: LatentPool) -> None:
    """Eight parts of a row each: their sum is as near to float32's gradient as a single row's gradient is."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make("pd", model, pool, ddil=False, student_dtype=dtype, gradient_accumulation=8)
        states, _ = trainer.source.draw(0)
        weights = trainer.weights[trainer.net]
        parts = list[Tensor]()
        for rows, share in trainer.parts(len(states)):
            part = states.part(rows)
            x0 = trainer.student(part.z, trainer.times[part.transition], trainer.condition(part.row))
            (share * (x0.float() - part.target).square().mean()).backward()
            if dtype == "bfloat16":
                parts.append(torch.cat([p.grad.flatten().float() for p in trainer.net.parameters()]))
            weights.take_gradients()
        found[dtype] = torch.cat([w.grad.flatten() for w in weights.parameters() if w.grad is not None])
    assert found["bfloat16"].dtype == torch.float32
    assert torch.allclose(found["bfloat16"], torch.stack(parts).sum(0), rtol=1e-6, atol=1e-9)
    assert distance(found["bfloat16"], found["float32"]) < 0.05


def test_a_networks_copy_knows_nothing_of_accelerate() -> None:
    """The next teacher must not run under autocast because the student did."""
    net = Accelerator(cpu=True).prepare(nn.Linear(3, 3))
    net._original_forward, net.forward = net.forward, lambda x: x
    copied = TrainedWeights(net, torch.bfloat16).network()
    assert vars(copied).keys() == vars(nn.Linear(3, 3)).keys()
    assert copied(torch.ones(1, 3)).shape == (1, 3) and not torch.equal(copied(torch.ones(1, 3)), torch.ones(1, 3))


def test_a_checkpoint_holds_the_weights_and_what_is_frozen_is_left_out() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[0].bias.requires_grad_(False)
    start = copy.deepcopy(net.state_dict())
    weights = TrainedWeights(net, torch.bfloat16)
    held = weights.state_dict()
    assert held.keys() == start.keys() - {"0.bias"}
    assert all(torch.equal(held[name], start[name]) for name, _ in net.named_parameters() if name in held)
    other = TrainedWeights(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(True), torch.bfloat16)
    with pytest.raises(ValueError, match="^the weights are those of another network$"):
        other.load_state_dict(held)
    held = {name: tensor.clone() for name, tensor in held.items()}
    with torch.no_grad():
        for weight in weights.parameters():
            weight.add_(1)
    weights.load_state_dict(held)
    assert torch.equal(weights.weights["0.weight"], start["0.weight"])
    assert torch.equal(net[0].weight, start["0.weight"].bfloat16())


@pytest.mark.parametrize("kind", ["pd", "lcm", "lcm-lora", "dmd2"])
def test_offload_trains_the_same_weights_bit_for_bit(model: Model, pool: LatentPool, kind: str) -> None:
    """On a CPU host and device are one, so what remains is that the weights of network and optimiser are apart."""
    here, there = (
        make(kind, model, pool, ddil=False, learning_rate=1e-3, offload=offload, gradient_accumulation=2)
        for offload in (False, True)
    )
    for step in range(2):
        here.update(step)
        there.update(step)
    for name, state in here.stateful().items():
        if name in ("net", "critic"):
            other = there.stateful()[name].state_dict()
            assert all(torch.equal(tensor, other[key]) for key, tensor in state.state_dict().items())
    own = {parameter.data_ptr() for parameter in there.net.parameters()}
    held = [parameter for group in there.optimizer.param_groups for parameter in group["params"]]
    assert held and not own & {parameter.data_ptr() for parameter in held}
    assert {parameter.device.type for parameter in held} == {"cpu"}
    for name, weight in there.weights[there.net].weights.items():
        assert torch.equal(weight, dict(there.net.named_parameters())[name])
