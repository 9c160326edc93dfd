"""DMD2: the gradient equals the formula and leads to the real distribution. Each network learns in its own turn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.diffusion.parameterization import calibrate_reflection
from ddil_core.diffusion.schedule import CLEAN, Schedule
from ddil_core.distillation.clipping import ClippedFraction
from ddil_core.distillation.critic import discriminator, feature_shape
from ddil_core.distillation.losses import gan_critic_loss, gan_generator_loss, matching_gradient, matching_loss
from ddil_core.distillation.matching import CLIPPED, MatchingStage, score_difference, teacher_segments
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.regression import RegressionStage
from ddil_core.models.model import Model
from tests.core.closed_form import Gaussian, distance, normal, shifts
from tests.core.distillation.test_dropout import make
from tests.pipelines import BETAS

PHASES = [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]


def stage(
    model: Model,
    pool: LatentPool,
    ddil: bool = False,
    reflection: str = "clamp",
    pairs: dict[str, Tensor] | None = None,
    **more: object,
) -> MatchingStage:
    told = {"collect_every": 6, "capacity": 256, "phases": PHASES}
    base = {"updates": 6, "batch_size": 8, "critic_updates": 2, "teacher_steps": 8, "warmup": 2, "learning_rate": 1e-3}
    config = MatchingConfig.model_validate(base | {"gan": {}, "ddil": told if ddil else None} | more)
    bound = calibrate_reflection(pool.mean.float(), reflection)  # type: ignore[arg-type]
    return MatchingStage(model.guided(3.0, bound), pool, config, Accelerator(cpu=True), pairs=pairs)


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradient_and_loss_are_the_formulas() -> None:
    x, real, fake = (normal(3, 2, 4, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    expected = np.stack(
        [(f - r) / np.abs(a - r).mean() for a, r, f in zip(x.numpy(), real.numpy(), fake.numpy(), strict=True)]
    )
    gradient = matching_gradient(x, real, fake)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-12)
    x.requires_grad_(True)
    loss = matching_loss(x, gradient)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * (expected**2).mean(), rel=1e-12)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected / expected.size, rtol=1e-9)


def test_gan_losses_are_softplus() -> None:
    real, fake = normal(64, dtype=torch.float64), normal(64, seed=1, dtype=torch.float64)
    f, r = fake.numpy(), real.numpy()
    assert float(gan_generator_loss(fake)) == pytest.approx(np.log1p(np.exp(-f)).mean(), rel=1e-10)
    expected = np.log1p(np.exp(f)).mean() + np.log1p(np.exp(-r)).mean()
    assert float(gan_critic_loss(real, fake)) == pytest.approx(expected, rel=1e-10)


def test_between_gaussians_it_leads_to_the_real_one() -> None:
    """Generator a + b ε, with both scores in closed form: a and b become the real mean and deviation."""
    schedule = Schedule.stable_diffusion()
    real = Gaussian(schedule, mean=0.4, std=0.6)
    a, b = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    told = shifts(256)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 500)
        x = a + b * torch.randn(256, 1, 2, 2, generator=generator)
        t = torch.randint(20, 981, (256,), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        fake = Gaussian(schedule, mean=float(a.detach()), std=float(b.detach()))
        with torch.no_grad():
            gradient = score_difference(real, fake, x, eps, t, told)
        optimizer.zero_grad()
        matching_loss(x, gradient).backward()
        optimizer.step()
    assert float(a.detach()) == pytest.approx(0.4, abs=0.05)
    assert abs(float(b.detach())) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("reflection", ["none", "clamp"])
def test_a_generators_loss_is_numpys(model: Model, pool: LatentPool, reflection: str) -> None:
    trainer = stage(model, pool, reflection=reflection, gan=None)
    states, _ = trainer.source.draw(0)
    generator = trainer.generator(0, 2)
    t = torch.randint(20, 981, (8,), generator=generator)
    eps = torch.randn(states.z.shape, generator=generator)
    squares = np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2)

    def levels(t: Tensor) -> list[np.ndarray]:
        return [np.sqrt(part[t.numpy()])[:, None, None, None] for part in (squares, 1 - squares)]

    text = trainer.condition(states.row).tensors["encoder_hidden_states"]
    nothing = model.nothing().tensors["encoder_hidden_states"].expand(8, -1, -1)
    times = trainer.times[states.transition]

    def v(z: np.ndarray, t: Tensor, told: Tensor) -> np.ndarray:
        with torch.no_grad():
            return model.denoiser.net(torch.from_numpy(z).float(), t, told).sample.double().numpy()

    alpha, sigma = levels(times)
    z = states.z.double().numpy()
    x = alpha * z - sigma * v(z, times, text)  # generator and critic are still the teacher's network
    alpha, sigma = levels(t)
    z = alpha * x + sigma * eps.double().numpy()
    v_c, v_0 = v(z, t, text), v(z, t, nothing)
    bound = trainer.teacher.reflection
    assert bound is not None
    low, high = ((bound.centre + sign * bound.bound).numpy()[None, :, None, None] for sign in (-1, 1))
    reflect = (lambda x: np.clip(x, low, high)) if reflection == "clamp" else (lambda x: x)
    real, fake = (reflect(alpha * z - sigma * output) for output in (v_0 + 3 * (v_c - v_0), v_c))
    g = (fake - real) / np.abs(x - real).reshape(8, -1).mean(1)[:, None, None, None]
    assert float(trainer.update(0)["loss"]) == pytest.approx(0.5 * (g**2).mean(), rel=1e-3)


def made_pairs(pool: LatentPool, count: int = 5) -> dict[str, Tensor]:
    """Pairs of noise and latents that no teacher has made."""
    size = (count, *pool.mean.shape[1:])
    return {"noise": normal(*size, seed=1), "x0": normal(*size, seed=2), "row": torch.arange(count) % len(pool)}


@pytest.mark.parametrize("parts", [1, 4])
def test_the_regression_goes_on_beside_the_matching_with_its_weight(model: Model, pool: LatentPool, parts: int) -> None:
    """The loss is the matching loss and, times ``weight``, the loss on the pairs. The draws stay those of DMD2."""
    pairs, losses = made_pairs(pool), []
    for weight in (0.0, 0.7):
        told = {"pairs": 5, "teacher_steps": 2, "updates": 1, "weight": weight}
        trainer = stage(model, pool, pairs=pairs, gan=None, regression=told, gradient_accumulation=parts)
        chosen = trainer._drawn(0).pair
        assert len(chosen) == (8 if weight else 0)
        losses.append(float(trainer.update(0)["loss"]))
    t = trainer.times[:1].expand(8)
    with torch.no_grad():
        x = model.denoiser(pairs["noise"][chosen], t, trainer.condition(pairs["row"][chosen]))
    expected = 0.7 * float((x - pairs["x0"][chosen]).square().mean())
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-3)


def test_the_regression_may_have_a_learning_rate_of_its_own(model: Model, pool: LatentPool) -> None:
    """Adam's first step moves every weight with a gradient by the learning rate."""
    for rate, expected in ((None, 1e-4), (3e-3, 3e-3)):
        told = {"pairs": 5, "teacher_steps": 2, "updates": 1, "learning_rate": rate}
        base = {"updates": 1, "batch_size": 4, "warmup": 0, "learning_rate": 1e-4, "weight_decay": 0}
        config = MatchingConfig.model_validate(base | {"regression": told})
        trainer = RegressionStage(model.guided(3.0), pool, config, Accelerator(cpu=True), made_pairs(pool))
        before = weights(trainer.net)
        trainer.update(0)
        moved = max(float((a - b).abs().max()) for a, b in zip(before, weights(trainer.net), strict=True))
        assert moved == pytest.approx(expected, rel=1e-3)


def test_each_network_learns_in_its_own_turn(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool)
    teacher, student, critic = (weights(net) for net in (model.denoiser.net, trainer.net, trainer.critic))
    states, _ = trainer.source.draw(0)
    trainer.critic.requires_grad_(False)
    clipped = {name: ClippedFraction(None, 1000, name) for name in CLIPPED}
    trainer.descend(trainer._generator_losses(states, 0, clipped), 0)
    assert same(critic, weights(trainer.critic)) and not same(student, weights(trainer.net))
    student = weights(trainer.net)
    trainer.critic.requires_grad_(True)
    trainer.step(trainer.critic, trainer.critic_optimizer, trainer._critic_losses(states, 1), 1e-3)
    assert same(student, weights(trainer.net)) and not same(critic, weights(trainer.critic))
    assert same(teacher, weights(model.denoiser.net))


@pytest.mark.parametrize("ddil", [False, True])
def test_parts_of_a_batch_are_the_batch(model: Model, pool: LatentPool, ddil: bool) -> None:
    memory = {"gradient_accumulation": 4, "gradient_checkpointing": True, "optimizer": "fused"}
    trainers = [stage(model, pool, ddil), stage(model, pool, ddil, **memory)]
    first, second = (trainer.update(0) for trainer in trainers)
    for key in ("loss", "gradient_norm", "critic_loss", "critic_gradient_norm"):
        assert float(first[key]) == pytest.approx(float(second[key]), rel=1e-3), key


def test_a_rounded_teachers_generator_and_critic_start_unrounded(model: Model, pool: LatentPool) -> None:
    own = model.denoiser
    rounded = type(own)(copy.deepcopy(own.net).bfloat16(), own.schedule, own.prediction)
    config = MatchingConfig.model_validate(
        {
            "updates": 2,
            "batch_size": 4,
            "teacher_dtype": "bfloat16",
            "regression": {"pairs": 4, "updates": 1, "teacher_steps": 2},
        }
    )
    teacher = GuidedDenoiser(rounded)
    trainer = MatchingStage(teacher, pool, config, Accelerator(cpu=True), own.net, own.net)
    pairs = RegressionStage(teacher, pool, config, Accelerator(cpu=True), {}, own.net)
    critic = {**dict(trainer.critic.named_parameters())}
    for name, weight in own.net.named_parameters():
        assert torch.equal(pairs.net.get_parameter(name), weight)
        assert torch.equal(trainer.net.get_parameter(name), weight)
        assert any(found.endswith(name) and torch.equal(copied, weight) for found, copied in critic.items())


def test_the_critic_learns_what_the_generator_draws(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool, gan=None)
    states, _ = trainer.source.draw(1)
    loss = float(next(trainer._critic_losses(states, 1)))
    generator = trainer.generator(1, 2)
    with torch.no_grad():
        x = trainer.generate(states, trainer.condition(states.row))
    t = torch.randint(1000, (8,), generator=generator)
    eps = torch.randn(x.shape, generator=generator)
    alpha, sigma = trainer.schedule.at(t, x)
    with torch.no_grad():
        v = model.denoiser.output(alpha * x + sigma * eps, t, trainer.condition(states.row))
    assert loss == pytest.approx(float((v - (alpha * eps - sigma * x)).square().mean()), rel=1e-3)


def test_reflection_leaves_the_generators_gradient_alive(model: Model, pool: LatentPool) -> None:
    """All of the generator's x̂ lies outside the bound; a clamp on its own branch would leave no gradient."""
    trainer = stage(model, pool, gan=None)
    assert trainer.teacher.reflection is not None
    trainer.teacher.reflection.bound.mul_(1e-4)
    logs = trainer.update(0)
    assert float(logs["clipped_generator"]) > 0.99
    assert float(logs["gradient_norm"]) > 1e-6


def test_data_are_pure_noise_where_the_generator_starts(model: Model, pool: LatentPool) -> None:
    """The regression of z on x₀ is α_t at the later timesteps, and 0 at the first, as in the authors' code."""
    phases = [{"until": 1, "aggregated": 0, "p_teacher": 0.5}]
    pool = LatentPool(normal(*pool.mean.shape).half(), pool.std, pool.condition)
    for first in (999, 899):
        times = [first, 749, 499, 249]
        trainer = make("dmd2", model, pool, {"phases": phases}, gan=None, timesteps=times, batch_size=256)
        drawn = list[tuple[Tensor, Tensor, Tensor]]()
        for step in range(4):
            states, _ = trainer.source.draw(step)
            x0, row = trainer.pool.draw(256, trainer.generator(step, 0))
            assert torch.equal(row, states.row)
            drawn.append((x0, states.z, states.transition))
        x0, z, transition = (torch.cat(column) for column in zip(*drawn, strict=True))
        for place, t in enumerate(times):
            clean, seen = (rows[transition == place].double().flatten() for rows in (x0, z))
            alpha, sigma = (float(level[t]) for level in (trainer.schedule.alphas, trainer.schedule.sigmas))
            error = 4 * sigma / float(clean.norm())
            assert float(clean @ seen / (clean @ clean)) == pytest.approx(alpha if place else 0, abs=error)
            assert error < 0.02
        noise = z[transition == 0]
        assert float(noise.std()) == pytest.approx(1, abs=0.01) and abs(float(noise.mean())) < 0.01


def test_backward_simulation_leaves_every_row_at_a_random_step(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool, batch_size=64)
    rows: list[int] = []
    hook = trainer.net.register_forward_hook(lambda _, args, output: rows.append(len(output.sample)))
    states = trainer.source.draw(0)[0]
    hook.remove()
    assert sum(rows) == int(states.transition.sum()) and not states.z.requires_grad
    counts = torch.bincount(states.transition, minlength=4)
    assert bool(((counts - 16).abs() < 3.5 * 12**0.5).all())
    start = states.z[states.transition == 0]
    assert abs(float(start.std()) - 1) < 0.05


def test_the_teachers_steps_end_at_the_generators_times() -> None:
    segments = teacher_segments(Schedule.stable_diffusion(), (999, 749, 499, 249), 8)
    assert segments[0] == [(999, 874), (874, 749)]
    assert segments[-1] == [(249, 124), (124, CLEAN)]


def test_discriminator_reads_a_mid_block(model: Model) -> None:
    assert feature_shape(model.denoiser.net, (8, 12)) == (16, (4, 6))
    for size in ((4, 4), (32, 32), (2, 3), (6, 24), (1, 16)):
        assert discriminator(16, size)(normal(2, 16, *size)).shape == (2, 1, 1, 1)
    first, second = (discriminator(16, (4, 4))(normal(2, 16, 4, 4)) for _ in range(2))
    assert distance(first, second) == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"timesteps": [399], "ddil": {"phases": PHASES}}, "a one-step generator starts at noise alone"),
        ({"timesteps": [249, 999]}, "timesteps fall and stay above 0"),
        (
            {"teacher_steps": 6, "ddil": {"phases": PHASES}},
            "teacher_steps is a multiple of the 4 timesteps, which 6 is not",
        ),
        (
            {"gradient_accumulation": 3},
            "gradient_accumulation takes a batch in equal parts, and 32 is not divisible by 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(more: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        MatchingConfig.model_validate({"updates": 1} | more)
