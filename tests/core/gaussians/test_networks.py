"""The exact denoiser against the score, an integral and its limits; the shipped world; the student's network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_core.data.datasets import open_data
from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.schedule import Schedule
from ddil_core.gaussians.__main__ import write_world
from ddil_core.gaussians.denoiser import PointDenoiser
from ddil_core.gaussians.networks import GaussianMixture
from ddil_core.gaussians.world import FOLDER, draw_classes, draw_points, make_mixture, shipped_mixture
from ddil_core.models.model import Model, load_model
from tests.core.closed_form import normal

CLASSES = {"the empty prompt": torch.zeros(1, 8), "class 3": torch.eye(8)[3:4]}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return load_model("gaussians", "cpu")


def x0_of(teacher: Model, z: Tensor, t: int, classes: Tensor) -> Tensor:
    """The teacher's x̂ [B, D] at points z [B, D]."""
    condition = Condition({"classes": classes.expand(len(z), -1)})
    return teacher.denoiser(z[..., None, None], torch.full((len(z),), t), condition).flatten(1)


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("t", [1, 400, 999])
def test_the_exact_estimate_is_that_of_the_score(teacher: Model, t: int, classes: Tensor) -> None:
    """Tweedie: α E[x₀ | z] = z + σ² ∇ log p(z), with the gradient of the density of torch's own mixture, in float64."""
    mixture, schedule = shipped_mixture(), teacher.denoiser.schedule
    alpha, sigma = (level.double() for level in schedule.levels(torch.tensor(t)))
    own = slice(15, 20) if classes.any() else slice(40)
    variance = (alpha * mixture.widths[own].double()) ** 2 + sigma**2
    modes = torch.distributions.Independent(
        torch.distributions.Normal(alpha * mixture.means[own].double(), variance.sqrt()[:, None].expand(-1, 8)), 1
    )
    chosen = torch.distributions.Categorical(mixture.weights[own].double())
    density = torch.distributions.MixtureSameFamily(chosen, modes)
    means = mixture.means.double()[torch.arange(64) % 40]
    z = (alpha * means + sigma * normal(64, 8, dtype=torch.float64)).requires_grad_()
    (score,) = torch.autograd.grad(density.log_prob(z).sum(), z)
    expected = ((z + sigma**2 * score) / alpha).detach()
    found = x0_of(teacher, z.detach().float(), t, classes).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_the_exact_estimate_is_an_integral() -> None:
    """In one dimension, E[x₀ | z] = ∫ x p(x) p(z | x) dx / ∫ p(x) p(z | x) dx on a fine grid."""
    mixture = make_mixture(dimensions=1, modes=4, classes=2, seed=3)
    denoiser = PointDenoiser(mixture, Schedule.from_config({"beta_schedule": "scaled_linear"} | BETAS), "v_prediction")
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    means, widths, weights = (part.double() for part in (mixture.means[:, 0], mixture.widths, mixture.weights))
    prior = (weights / widths * torch.exp(-0.5 * ((x[:, None] - means) / widths) ** 2)).sum(1)
    for t in (50, 700):
        alpha, sigma = denoiser.schedule.levels(torch.tensor(t))
        for z in (-1.5, 0.1, 2.0):
            joint = prior * torch.exp(-0.5 * ((z - alpha * x) / sigma) ** 2)
            expected = float((x * joint).sum() / joint.sum())
            found = denoiser(torch.full((1, 1, 1, 1), z), torch.tensor([t]), Condition({"classes": torch.zeros(1, 2)}))
            assert float(found) == pytest.approx(expected, abs=2e-4)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def test_the_limits(teacher: Model) -> None:
    """Near t = 0 the estimate is z/α on the data; at t = 999 it is near the mean of the class."""
    mixture = shipped_mixture()
    points = torch.from_numpy(draw_points(mixture, np.full(256, 3), np.random.default_rng(0)))
    alpha, sigma = (float(level) for level in teacher.denoiser.schedule.levels(torch.tensor(0)))
    clean = x0_of(teacher, alpha * points + sigma * normal(256, 8), 0, CLASSES["class 3"])
    assert float((clean - points).square().mean().sqrt()) < sigma / alpha
    weights = mixture.weights[15:20] / mixture.weights[15:20].sum()
    mean = weights @ mixture.means[15:20]
    noisy = x0_of(teacher, normal(4096, 8), 999, CLASSES["class 3"]).mean(0)
    assert float((noisy - mean).norm() / mean.norm()) < 0.1


def test_the_shipped_world_is_what_the_generator_makes() -> None:
    shipped, made = shipped_mixture().state_dict(), make_mixture().state_dict()
    assert all(torch.allclose(shipped[name], made[name], rtol=1e-6) for name in made)
    assert (FOLDER / "ddil.json").is_file()
    mixture = make_mixture()
    weights, widths, means = (part.detach().double() for part in (mixture.weights, mixture.widths, mixture.means))
    assert torch.allclose(weights @ means, torch.zeros(8, dtype=torch.float64), atol=1e-6)
    assert float((weights @ (means**2 + widths[:, None] ** 2)).mean()) == pytest.approx(1, abs=1e-5)


def test_another_world_loads_by_its_folder(tmp_path: Path) -> None:
    write_world(make_mixture(dimensions=2, modes=6, classes=3, seed=1), tmp_path / "world")
    model = load_model(str(tmp_path / "world"), "cpu")
    assert model.latent_shape == (2, 1, 1)
    assert model.encode(["class 2", "", "class 0"]).tensors["classes"].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_points_follow_the_mixture() -> None:
    mixture, random = shipped_mixture(), np.random.default_rng(5)
    classes = draw_classes(mixture, 20_000, random)
    shares = np.bincount(classes, minlength=8) / len(classes)
    assert np.abs(shares - mixture.class_weights().numpy()).max() < 0.01
    points = draw_points(mixture, classes, random)
    assert points.dtype == np.float32
    assert np.abs(points.mean(0)).max() < 0.03
    assert points.var(0).mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("depth", [1, 4])
def test_a_student_network_is_called_as_the_teacher_is(teacher: Model, depth: int) -> None:
    assert isinstance(teacher.denoiser.net, GaussianMixture)
    denoiser = PointDenoiser(teacher.denoiser.net.student(16, depth), teacher.denoiser.schedule, "v_prediction")
    z = normal(3, 8, 1, 1)
    assert denoiser(z, torch.tensor([0, 500, 999]), teacher.encode(["class 0", "", "class 7"])).shape == z.shape
    assert len([*denoiser.net.down_blocks, denoiser.net.mid_block, *denoiser.net.up_blocks]) == depth


def test_the_first_points_do_not_depend_on_how_many_are_read() -> None:
    data = open_data("gaussians")
    few, many = (np.concatenate(list(data.images(count))) for count in (10, 200))
    np.testing.assert_array_equal(few, many[:10])
    assert data.prompts(10) == data.prompts(200)[:10]
