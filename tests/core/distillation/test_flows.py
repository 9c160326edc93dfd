"""PD, LCM and DMD2 on a flow: targets, losses and gradients are those that a few lines of torch give.

The references know a flow alone: z = (1 − σ) x₀ + σ ε with σ = t/1000, a network that predicts u = ε − x₀, and Euler's
steps along u.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.diffusion.few_step import times_of
from ddil_core.diffusion.schedule import CLEAN, FlowSchedule
from ddil_core.distillation.clipping import ClippedFraction
from ddil_core.distillation.losses import pd_target
from ddil_core.distillation.progressive import two_step_target
from ddil_core.models.model import Model, load_model
from tests.core.closed_form import Gaussian, distance, normal, shifts
from tests.core.distillation.test_dropout import make
from tests.pipelines import save_pipeline

FLOW = FlowSchedule.straight(3.0)
GUIDANCE = 3.0  # of the teacher of ``make``
LCM: dict[str, Any] = {"w_embedding": None, "teacher_steps": 8, "guidance_range": [2.0, 5.0]}


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An untrained pipeline in SD3's layout."""
    folder = tmp_path_factory.mktemp("flow")
    return load_model(str(save_pipeline(folder, None, seed=1, layout="StableDiffusion3Pipeline")), "cpu")


@pytest.fixture(scope="module")
def images(flow: Model, tmp_path_factory: pytest.TempPathFactory) -> LatentPool:
    return encode_pool(flow, open_data("shapes"), 24, tmp_path_factory.mktemp("pool") / "data.safetensors")


def wide(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1, 1)


class Reference:
    """A stage's networks, called by hand."""

    def __init__(self, model: Model, trainer: Any) -> None:
        self.model, self.net = model, copy.deepcopy(trainer.net)
        self.nothing = model.nothing().tensors
        bound = trainer.teacher.reflection
        self.low, self.high = ((bound.centre + sign * bound.bound).view(1, -1, 1, 1) for sign in (-1, 1))

    def inside(self, x0: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x0, self.low), self.high)

    def velocity(self, net: nn.Module, z: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        return net(hidden_states=z, timestep=t, **told).sample

    @torch.no_grad()
    def guided(self, z: Tensor, t: Tensor, told: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        nothing = {name: value.expand(len(z), *value.shape[1:]) for name, value in self.nothing.items()}
        net = self.model.denoiser.net
        with_prompt, without = self.velocity(net, z, t, told), self.velocity(net, z, t, nothing)
        return without + scale * (with_prompt - without)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names = [name for name, _ in self.net.named_parameters()]
        found = torch.autograd.grad(loss, list(self.net.parameters()), allow_unused=True)
        return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def updated(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first update, and its gradient before clipping, by weight."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda weight: found.update({name: weight.grad.clone()})

    hooks = [weight.register_post_accumulate_grad_hook(keep(name)) for name, weight in trainer.net.named_parameters()]
    loss = float(trainer.update(0)["loss"])
    for hook in hooks:
        hook.remove()
    return loss, found


def require_equal(trainer: Any, reference: Reference, loss: Tensor) -> None:
    """The update's loss and gradient are the reference's, before the update."""
    expected = reference.gradients(loss)
    value, found = updated(trainer)
    assert value == pytest.approx(float(loss.detach()), rel=1e-4)
    ours, theirs = (torch.cat([part[name].flatten() for name in sorted(expected)]) for part in (found, expected))
    assert distance(ours, theirs) < 1e-3 and float(theirs.norm()) > 1e-6
    assert all(not bool(found[name].any()) for name in found.keys() - expected.keys())


def test_two_euler_steps_amount_to_the_target() -> None:
    """A velocity that turns with z and t, written out by hand."""

    class Turning:
        schedule, nfe = FLOW, 1

        def u(self, z: Tensor, t: Tensor) -> Tensor:
            return z.flip(-1) * wide(t) / 500 - 0.3

        def __call__(self, z: Tensor, t: Tensor, condition: Any) -> Tensor:
            return z - wide(t) / 1000 * self.u(z, t)

    denoiser, grid = Turning(), [*FLOW.grid(8), CLEAN]
    table = torch.tensor([grid[i : i + 3] for i in (0, 2, 4, 6)], dtype=torch.float64)
    z = normal(4, 2, 4, 4)
    t, middle, s = table.unbind(1)
    first, second, end = (wide(time.clamp(min=0)) / 1000 for time in (t, middle, s))
    z_middle = z + (second - first) * denoiser.u(z, t)
    z_s = z_middle + (end - second) * denoiser.u(z_middle, middle)
    velocity = (z - z_s) / (first - end)
    target = two_step_target(denoiser, z, t, middle, s, shifts(4))
    torch.testing.assert_close(target, z - first * velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z + (end - first) * (z - target) / first, z_s, rtol=1e-5, atol=1e-5)
    assert distance(target[3:], z_middle[3:] - second[3:] * denoiser.u(z_middle, middle)[3:]) < 1e-5  # ends clean


def test_the_target_of_a_straight_flow_is_its_end() -> None:
    """All data in one point m: the velocity is constant on every line, and two steps give m as one does."""
    point, t = Gaussian(FLOW, mean=0.4, std=0.0), torch.tensor(FLOW.grid(8)[::2])
    middle, s = torch.tensor(FLOW.grid(8)[1::2]), torch.tensor([*FLOW.grid(4)[1:], CLEAN])
    z = normal(4, 2, 4, 4)
    target = two_step_target(point, z, t, middle, s, shifts(4))
    torch.testing.assert_close(target, torch.full_like(z, 0.4), rtol=1e-5, atol=1e-5)
    assert torch.equal(pd_target(FLOW, z, z + 1, t[3:], s[3:]), z + 1)


@pytest.mark.parametrize("reflected", [False, True])
def test_pd_follows_its_reference(flow: Model, images: LatentPool, reflected: bool) -> None:
    trainer = make("pd", flow, images, ddil=False)
    assert [t for t, _, _ in trainer.table.tolist()] == [1000, 900, 750, 500]
    reference = Reference(flow, trainer)
    if not reflected:
        trainer.teacher.reflection = None
    states, _ = trainer.source.draw(0)
    t, middle, s = trainer.table[states.transition].unbind(1)
    told = trainer.condition(states.row).tensors

    def step(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        now, then = wide(t) / 1000, wide(s.clamp(min=0)) / 1000
        u = reference.guided(z, t, told, GUIDANCE)
        if not reflected:
            return z + (then - now) * u
        x0 = reference.inside(z - now * u)
        return (1 - then) * x0 + then * (z - (1 - now) * x0) / now

    z, sigma, end = states.z, wide(t) / 1000, wide(s.clamp(min=0)) / 1000
    goal = step(step(z, t, middle), middle, s)
    target = z - sigma * (z - goal) / (sigma - end)
    drawn = z - sigma * reference.velocity(reference.net, z, t, told)
    weight = (((1 - sigma) / sigma) ** 2).clamp(min=1)
    require_equal(trainer, reference, (weight * (drawn - target) ** 2).mean())


@pytest.mark.parametrize("weighting", ["none", "v"])
def test_lcm_follows_its_reference(flow: Model, images: LatentPool, weighting: str) -> None:
    trainer = make("lcm", flow, images, ddil=False, weighting=weighting, **LCM)
    assert trainer.table[:, 0].tolist() == pytest.approx(FLOW.grid(8)) and trainer.table[-1, 1] == 0
    reference = Reference(flow, trainer)
    states, _ = trainer.source.draw(0)
    t, s = trainer.table[states.transition].unbind(1)
    told, z, sigma, end = trainer.condition(states.row).tensors, states.z, wide(t) / 1000, wide(s) / 1000
    assert 2 <= float(states.guidance.min()) < float(states.guidance.max()) <= 5
    x0 = reference.inside(z - sigma * reference.guided(z, t, told, wide(states.guidance)))
    z_s = (1 - end) * x0 + end * (z - (1 - sigma) * x0) / sigma
    with torch.no_grad():  # the average is still the student
        target = reference.inside(z_s - end * reference.velocity(reference.net, z_s, s, told))
    d = z - sigma * reference.velocity(reference.net, z, t, told) - target
    errors = (d**2 + 1e-6).sqrt() - 1e-3
    require_equal(trainer, reference, (errors / sigma if weighting == "v" else errors).mean())


def test_dmd2_follows_its_reference(flow: Model, images: LatentPool) -> None:
    trainer = make("dmd2", flow, images, ddil=False, gan=None)
    assert trainer.times.tolist() == [1000, 900, 750, 500]
    reference = Reference(flow, trainer)
    states, _ = trainer.source.draw(0)
    generator = trainer.generator(0, 2)
    n = torch.randint(20, 981, (8,), generator=generator).double()
    eps = torch.randn(states.z.shape, generator=generator)
    straight = (n + 1) / 1000
    t = (1000 * 3 * straight / (1 + 2 * straight)).float()
    told, at = trainer.condition(states.row).tensors, trainer.times[states.transition]
    x = states.z - wide(at) / 1000 * reference.velocity(reference.net, states.z, at, told)
    sigma = wide(t) / 1000
    z = (1 - sigma) * x.detach() + sigma * eps
    with torch.no_grad():  # the critic is still the teacher's network, and reads no guidance
        fake = reference.inside(z - sigma * reference.velocity(flow.denoiser.net, z, t, told))
    real = reference.inside(z - sigma * reference.guided(z, t, told, GUIDANCE))
    apart = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    require_equal(trainer, reference, 0.5 * (x - (x - (fake - real) / apart).detach()).square().mean())


def test_the_critic_learns_the_velocity_of_what_the_generator_draws(flow: Model, images: LatentPool) -> None:
    trainer = make("dmd2", flow, images, ddil=False, gan=None)
    states, _ = trainer.source.draw(1)
    loss = float(next(trainer._critic_losses(states, 1)).detach())
    generator = trainer.generator(1, 2)
    t = times_of(FLOW, torch.randint(1000, (8,), generator=generator))
    eps = torch.randn(states.z.shape, generator=generator)
    condition, sigma = trainer.condition(states.row), wide(t) / 1000
    with torch.no_grad():
        x = trainer.generate(states, condition)
        u = flow.denoiser.net(hidden_states=(1 - sigma) * x + sigma * eps, timestep=t, **condition.tensors).sample
    assert loss == pytest.approx(float((u - (eps - x)).square().mean()), rel=1e-3)


def test_the_discriminator_reads_the_tokens_of_the_middle_block(flow: Model, images: LatentPool) -> None:
    """Tokens lie row by row, as the patches of the latents do."""
    trainer = make("dmd2", flow, images, ddil=False)
    critic, net = trainer.critic, trainer.critic.denoiser.net
    tokens: list[Tensor] = []
    hook = net.transformer_blocks[1].register_forward_hook(lambda _, args, output: tokens.append(output[1]))
    z, t = normal(3, *flow.latent_shape), torch.tensor([1000.0, 750.5, 20.0])
    condition = flow.encode(["a small red circle", "a green square", ""])
    output, logits = critic.eval()(z, t, condition)
    hook.remove()
    assert tokens[0].shape == (3, 16, 16)  # patches of 2 on a side of 8, two heads of 8 features
    rows = torch.stack([tokens[0][:, 4 * y : 4 * y + 4] for y in range(4)], 1)  # [B, y, x, C]
    torch.testing.assert_close(logits, critic.head(rows.permute(0, 3, 1, 2)).flatten())
    torch.testing.assert_close(output, flow.denoiser.output(z, t, condition))
    assert logits.shape == (3,) and math.isfinite(float(logits.detach().sum()))


@pytest.mark.parametrize("kind", ["pd", "lcm", "dmd2"])
def test_parts_of_a_batch_are_the_batch(flow: Model, images: LatentPool, kind: str) -> None:
    """Also with activations that are computed twice, where the discriminator's block is called twice too."""
    more = LCM if kind == "lcm" else {}
    memory = {"gradient_accumulation": 4, "gradient_checkpointing": True}
    first, second = (make(kind, flow, images, **more, **parts).update(0) for parts in ({}, memory))
    keys = ["loss", "gradient_norm", *(["critic_loss", "critic_gradient_norm"] if kind == "dmd2" else [])]
    for key in keys:
        assert float(first[key]) == pytest.approx(float(second[key]), rel=1e-3), key


@pytest.mark.parametrize(("kind", "lengths"), [("pd", (4, 4)), ("lcm", (8, 4)), ("dmd2", (4, 4))])
def test_rollouts_visit_the_times_of_the_flow_with_targets_of_their_own(
    flow: Model, images: LatentPool, kind: str, lengths: tuple[int, int]
) -> None:
    for p_teacher, length in zip((1.0, 0.0), lengths, strict=True):
        trainer = make(kind, flow, images, **(LCM if kind == "lcm" else {}))
        trainer.source.collect(p_teacher, 16, batch=0)
        dataset = trainer.source.dataset
        places = torch.tensor(dataset.queue)
        transition = dataset.transition[places]
        times = trainer.times[transition]
        expected = torch.tensor(FLOW.grid(length))
        assert dataset.collected == 16
        torch.testing.assert_close(times.unique(), expected.sort().values.to(times.dtype))
        assert bool(dataset.z.isfinite().all())
        if kind != "dmd2":
            guidance = None if dataset.guidance is None else dataset.guidance[places]
            fresh = trainer.source.labeler.label(dataset.z[places], transition, dataset.row[places], guidance)
            assert distance(dataset.target[places], fresh) < 1e-5
    assert torch.equal(
        trainer.source.diffuse(normal(1, 8, 8, 8), z := normal(1, 8, 8, 8, seed=1), trainer.times[:1]), z
    )


def test_the_last_band_of_the_clipped_fraction_holds_the_start_of_a_flow(flow: Model, images: LatentPool) -> None:
    bound = make("pd", flow, images, ddil=False).teacher.reflection
    clipped = ClippedFraction(bound, 1000)
    clipped.add(torch.full((2, 8, 8, 8), 1e6), torch.tensor([1000.0, 500.0]))
    logs = clipped.logs()
    assert logs["clipped_fraction_t750-999"].tolist() == logs["clipped_fraction_t500-749"].tolist() == [1, 1]
