"""Round trips of ε, v and x₀; reflection against independent formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser
from ddil_core.diffusion.parameterization import (
    Reflection,
    ReflectionMode,
    boundary_scalings,
    calibrate_reflection,
    to_eps,
    to_v,
    to_x0,
)
from ddil_core.diffusion.schedule import FlowSchedule, Schedule
from ddil_core.diffusion.solvers import ddim
from ddil_core.models.model import Model, load_model
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import distance, normal
from tests.pipelines import save_pipeline

SD = Schedule.stable_diffusion()
MODES: tuple[ReflectionMode, ...] = ("clamp", "fold", "dynamic")


def noised(t: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x₀, ε, z, α, σ in float64 at the given timesteps."""
    x0, eps = (normal(len(t), 3, 4, 4, seed=seed + i, dtype=torch.float64) * (1 + i) for i in range(2))
    alpha, sigma = SD.at(torch.tensor(t), x0)
    return x0, eps, alpha * x0 + sigma * eps, alpha, sigma


@pytest.mark.parametrize("seed", range(4))
def test_round_trips(seed: int) -> None:
    x0, eps, z, alpha, sigma = noised([0, 250, 500, 749, 999], seed)
    v = alpha * eps - sigma * x0
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(to_x0("v_prediction", v, z, alpha, sigma), x0, **close)
    torch.testing.assert_close(to_x0("epsilon", eps, z, alpha, sigma), x0, **close)
    assert to_x0("sample", x0, z, alpha, sigma) is x0
    torch.testing.assert_close(to_eps(x0, z, alpha, sigma), eps, **close)
    torch.testing.assert_close(to_v(x0, z, alpha, sigma), v, **close)


def test_a_flows_velocity_points_from_x0_to_eps_or_back() -> None:
    x0, eps = (normal(4, 3, 4, 4, seed=i, dtype=torch.float64) for i in range(2))
    flow, t = FlowSchedule.straight(3.0), torch.tensor([1000.0, 750.5, 250.0, 1.0], dtype=torch.float64)
    alpha, sigma = flow.at(t, x0)
    z = flow.add_noise(x0, eps, t)
    torch.testing.assert_close(z, x0 + (t / 1000).view(-1, 1, 1, 1) * (eps - x0))
    torch.testing.assert_close(to_x0("flow", eps - x0, z, alpha, sigma), x0)
    torch.testing.assert_close(to_x0("rectified_flow", x0 - eps, z, alpha, sigma), x0)
    torch.testing.assert_close(to_eps(x0, z, alpha, sigma), eps)


def test_a_consistency_function_is_z_itself_at_time_zero() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1, 259, 999]), torch.zeros(4, 2, dtype=torch.float64))
    assert (float(c_skip[0]), float(c_out[0])) == (1.0, 0.0)
    torch.testing.assert_close(c_skip + c_out**2, torch.ones_like(c_skip))  # 0.25/(s² + 0.25) and s²/(s² + 0.25)
    assert bool((c_out[1:] > 0.99).all())


def test_eps_takes_a_plus_where_the_appendix_prints_a_minus() -> None:
    x0, eps, z, alpha, sigma = noised([250, 500, 749], 0)
    v = alpha * eps - sigma * x0
    torch.testing.assert_close(sigma * z + alpha * v, eps)
    torch.testing.assert_close(sigma * z + alpha * v, to_eps(x0, z, alpha, sigma))
    assert distance(sigma * z - alpha * v, eps) > 0.5


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(
        WrongCommand, match=r"'score' is not known; it may be one of epsilon, v_prediction, sample, flow,"
    ):
        to_x0("score", *[torch.ones(1)] * 4)  # type: ignore[arg-type]


def reflection(mode: ReflectionMode) -> Reflection:
    """Channel 0 within 0.5 ± 1, channel 1 within −1 ± 3."""
    return Reflection(mode, torch.tensor([0.5, -1.0]), torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_reflection_leaves_what_is_inside(mode: ReflectionMode) -> None:
    inside = torch.rand(8, 2, 5, 5) * torch.tensor([2.0, 6.0]).view(2, 1, 1) + torch.tensor([-0.5, -4.0]).view(2, 1, 1)
    torch.testing.assert_close(reflection(mode)(inside), inside, rtol=0, atol=1e-6)
    assert reflection(mode).clipped_fraction(inside) == 0


@pytest.mark.parametrize("mode", MODES)
def test_reflection_never_lets_anything_outside(mode: ReflectionMode) -> None:
    x0 = normal(8, 2, 5, 5) * 20
    held = reflection(mode)(x0)
    low, high = torch.tensor([-0.5, -4.0]).view(2, 1, 1), torch.tensor([1.5, 2.0]).view(2, 1, 1)
    assert bool(((held >= low - 1e-5) & (held <= high + 1e-5)).all())
    assert held.shape == x0.shape
    assert held.dtype == x0.dtype


def bounce(x: float, c: float) -> float:
    """Reflect a ball between walls at ±c until it stays inside."""
    while not -c <= x <= c:
        x = 2 * c - x if x > c else -2 * c - x
    return x


def test_fold_is_a_ball_between_two_walls() -> None:
    x = normal(2, 2, 10, 10, dtype=torch.float64) * 12
    held = reflection("fold")(x)
    for channel, (centre, bound) in enumerate(((0.5, 1.0), (-1.0, 3.0))):
        expected = [centre + bounce(value - centre, bound) for value in x[:, channel].flatten().tolist()]
        np.testing.assert_allclose(held[:, channel].flatten().numpy(), expected, atol=1e-12)


def test_clamp_holds_each_channel_to_its_own_bound() -> None:
    x = torch.tensor([9.0, 9.0, -9.0, -9.0]).view(2, 2, 1, 1)
    assert reflection("clamp")(x).flatten().tolist() == [1.5, 2.0, -0.5, -4.0]


def test_dynamic_shrinks_a_sample_by_its_own_quantile() -> None:
    x = torch.stack([torch.linspace(-4, 4, 400), torch.linspace(-0.9, 0.9, 400)]).view(2, 1, 20, 20)
    dynamic = Reflection("dynamic", torch.zeros(1), torch.ones(1), quantile=0.9)
    scale = np.quantile(np.abs(x[0].numpy()), 0.9)
    np.testing.assert_allclose(dynamic(x)[0], np.clip(x[0].numpy() / scale, -1, 1), atol=1e-6)
    assert torch.equal(dynamic(x)[1], x[1])


def test_clipped_fraction_counts_entries_outside() -> None:
    x = torch.tensor([0.0, 1.6, 0.0, 2.1]).view(1, 2, 1, 2).repeat(3, 1, 1, 1)
    assert float(reflection("none").clipped_fraction(x)) == 0.5  # 1.6 is out of channel 0, 2.1 of channel 1


def test_calibration_takes_each_channel_quantiles() -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double()
    latents = torch.stack([order, 3 * order - 500]).view(2, 10, 10, 10).permute(1, 0, 2, 3)
    held = calibrate_reflection(latents, "clamp", quantile=0.99)
    torch.testing.assert_close(held.centre, torch.tensor([499.5, 998.5]))
    torch.testing.assert_close(held.bound, torch.tensor([489.5, 1468.5]))  # 10 values beyond each end
    assert float(held.clipped_fraction(latents)) == pytest.approx(0.02)


def test_calibration_at_quantile_one_holds_everything() -> None:
    latents = normal(6, 3, 4, 4)
    assert calibrate_reflection(latents, "clamp", quantile=1.0).clipped_fraction(latents * 0.999999) == 0


def sorted_ends(latents: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Compute the centre and the bound with a full sort."""
    ordered = latents.float().transpose(0, 1).flatten(1).sort(dim=1).values
    last = ordered.shape[1] - 1
    edge = min(int((1 - quantile) * (last + 1)), last // 2)
    low, high = ordered[:, edge], ordered[:, last - edge]
    return (low + high) / 2, ((high - low) / 2).clamp(min=1e-6)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.9995, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 2), (7, 1, 3, 1), (40, 4, 8, 8), (3, 2, 5)])
def test_a_partition_gives_the_bits_of_a_sort(shape: tuple[int, ...], dtype: torch.dtype, quantile: float) -> None:
    """For distinct values and for many equal values. The latents stay unchanged."""
    for latents in (normal(*shape).to(dtype), (2 * normal(*shape)).round().to(dtype), torch.zeros(shape, dtype=dtype)):
        before = latents.clone()
        held = calibrate_reflection(latents, "clamp", quantile)
        centre, bound = sorted_ends(latents, quantile)
        assert torch.equal(held.centre, centre) and torch.equal(held.bound, bound)
        assert held.centre.dtype == torch.float32
        assert torch.equal(latents, before)


def test_calibration_needs_the_memory_of_one_channel() -> None:
    """One channel in float32, and no copy or index of the size of the pool."""
    latents = normal(200, 4, 16, 16).half()
    made = list[int]()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for one in tree_leaves(found):
                if isinstance(one, Tensor) and one.untyped_storage().data_ptr() != latents.untyped_storage().data_ptr():
                    made.append(one.untyped_storage().nbytes())
            return found

    with Counted():
        calibrate_reflection(latents)
    assert max(made) == 4 * latents[:, 0].numel()  # a sort of all makes tensors of four and of eight times that


def test_ddim_takes_eps_from_the_reflected_x0(model: Model) -> None:
    held = Reflection("clamp", torch.zeros(8), torch.full((8,), 0.05))
    z, t, s = normal(2, *model.latent_shape), torch.tensor([999, 749]), torch.tensor([749, 500])
    condition = model.encode(["a small red circle", "a blue star"])
    free, kept = model.guided(3.0)(z, t, condition), model.guided(3.0, held)(z, t, condition)
    assert float(held.clipped_fraction(free)) > 0.05
    torch.testing.assert_close(kept, free.clamp(-0.05, 0.05))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SD.at(t, z), SD.at(s, z)
    z_s, _ = ddim(SD, z, t, s, kept)
    eps = (z - alpha_t * kept) / sigma_t
    torch.testing.assert_close(z_s, alpha_s * kept + sigma_s * eps)
    torch.testing.assert_close(alpha_t * kept + sigma_t * eps, z)  # the pair (x̂, ε̂) still makes z


def test_guidance_is_eps_null_plus_g_times_the_difference(model: Model) -> None:
    z, t = normal(2, *model.latent_shape), torch.tensor([749, 250])
    condition, nothing = model.encode(["a small red circle", "a blue star"]), model.encode(["", ""])
    alpha, sigma = SD.at(t, z)
    eps = [to_eps(model.denoiser(z, t, told), z, alpha, sigma) for told in (nothing, condition)]
    guided = model.guided(4.0)
    expected = to_x0("epsilon", eps[0] + 4.0 * (eps[1] - eps[0]), z, alpha, sigma)
    assert distance(guided(z, t, condition), expected) < 1e-5
    assert (guided.nfe, model.guided(1.0).nfe) == (2, 1)
    assert torch.equal(model.guided(1.0)(z, t, condition), model.denoiser(z, t, condition))
    assert model.guided().guidance_scale == 3.0  # its own, from ddil.json


def test_guidance_by_row_is_the_guidance_of_each_row(model: Model) -> None:
    z, t = normal(2, *model.latent_shape), torch.tensor([749, 250])
    condition = model.encode(["a small red circle", "a blue star"])
    by_row = replace(condition, guidance=torch.tensor([1.5, 6.0]))
    together = GuidedDenoiser(model.denoiser, model.nothing(), 3.0)(z, t, by_row)
    for row, scale in enumerate((1.5, 6.0)):
        assert distance(together[row], model.guided(scale)(z, t, condition)[row]) < 1e-5


def test_a_network_with_an_embedding_reads_the_guidance_of_each_row(tmp_path: Path) -> None:
    lcm = load_model(str(save_pipeline(tmp_path, None, seed=1, layout="LatentConsistencyModelPipeline")))
    z, t = normal(2, *lcm.latent_shape), torch.tensor([759, 259])
    condition = lcm.encode(["a small red circle", "a blue star"])
    together = lcm.guided(3.0)(z, t, replace(condition, guidance=torch.tensor([1.5, 6.0])))
    for row, scale in enumerate((1.5, 6.0)):
        assert distance(together[row], lcm.guided(scale)(z, t, condition)[row]) < 1e-5


def test_guidance_without_the_empty_prompt_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="the guidance scale 3 needs the condition of the empty prompt"):
        GuidedDenoiser(model.denoiser, None, 3.0)


def test_condition_rows_and_expansion() -> None:
    condition = Condition({"text": torch.arange(6).view(3, 2)})
    assert condition.rows(torch.tensor([2, 0])).tensors["text"].tolist() == [[4, 5], [0, 1]]
    assert len(condition.rows(torch.tensor([1])).expand(5)) == 5
    whole = replace(condition, guidance=torch.tensor([2.0, 3.0, 4.0]), noise=torch.arange(12.0).view(3, 2, 1, 1, 2))
    part = whole.rows(torch.tensor([2, 0]))
    assert part.guidance is not None and part.guidance.tolist() == [4.0, 2.0]
    assert part.noise is not None and part.noise.flatten().tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert Condition.cat([whole, whole]).guidance is None
