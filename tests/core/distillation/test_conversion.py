"""ε → v: the target is the teacher's estimate. The converted model equals the teacher and can be guided."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.diffusion.denoiser import GuidedDenoiser, UNetDenoiser
from ddil_core.diffusion.parameterization import to_x0
from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.config import ConvertConfig, ProgressiveConfig, StageConfig
from ddil_core.distillation.conversion import ConversionStage
from ddil_core.distillation.run import Run
from ddil_core.models.model import Model, load_model
from tests.core.closed_form import distance
from tests.pipelines import TEACHER, save_pipeline

UPDATES = 60


@pytest.fixture(scope="module", params=["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, LatentPool]:
    folder = tmp_path_factory.mktemp("eps")
    model = load_model(str(save_pipeline(folder, TEACHER, seed=1, layout=request.param, prediction="epsilon")))
    return model, encode_pool(model, open_data("shapes"), 24, folder / "data.safetensors")


def stage(
    model: Model, pool: LatentPool, unconditional: float = 0.1, updates: int = UPDATES, parts: int = 1
) -> ConversionStage:
    config = ProgressiveConfig(
        stages=(StageConfig(steps=4, updates=1),), batch_size=16, learning_rate=5e-3, warmup=5, ema_decay=0.9,
        gradient_accumulation=parts,
    )  # fmt: skip
    convert = ConvertConfig(updates=updates, unconditional=unconditional)
    return ConversionStage(model.guided(1.0), model.nothing(), pool, convert, config, Accelerator(cpu=True))


def test_the_target_is_the_v_of_the_teachers_own_estimate(teacher: tuple[Model, LatentPool]) -> None:
    trainer = stage(*teacher)
    x0, row = teacher[1].draw(6, torch.Generator().manual_seed(0))
    t = torch.tensor([0, 100, 400, 700, 950, 999])
    z = trainer.schedule.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), t)
    condition = trainer.condition(row)
    alpha, sigma = trainer.schedule.at(t, z)
    v = trainer.target(z, t, condition)
    with torch.no_grad():
        estimate = teacher[0].denoiser(z, t, condition)
        eps = teacher[0].denoiser.output(z, t, condition)
    assert distance(to_x0("v_prediction", v, z, alpha, sigma), estimate) < 1e-5
    assert distance(alpha * eps - sigma * estimate, v) < 1e-3  # float32 where σ is 0.03


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_rows_is_told_nothing(teacher: tuple[Model, LatentPool], share: float) -> None:
    trainer = stage(*teacher, unconditional=share)
    told = []
    hook = trainer.net.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    for step in range(12):
        trainer.update(step)
    hook.remove()
    nothing = teacher[0].nothing().tensors["encoder_hidden_states"]
    silent = (torch.cat(told) == nothing).flatten(1).all(1).float().mean()
    assert abs(float(silent) - share) <= 3.5 * (share * (1 - share) / 192) ** 0.5


def test_parts_of_a_batch_are_the_batch(teacher: tuple[Model, LatentPool]) -> None:
    whole, parted = stage(*teacher), stage(*teacher, parts=4)
    sizes = list[int]()
    parted.net.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["encoder_hidden_states"].shape[0]), with_kwargs=True
    )
    first, second = whole.update(0), parted.update(0)
    assert sizes == [4] * 4
    for key in ("loss", "gradient_norm"):
        assert float(first[key]) == pytest.approx(float(second[key]), rel=1e-3)


def test_the_student_becomes_its_teacher_in_v(teacher: tuple[Model, LatentPool]) -> None:
    """On a process of little noise: there the v of an untrained ε, (ε̂ − σ z)/α, has one size at all times."""
    model, pool = teacher
    gentle = Schedule.from_betas(np.linspace(1e-4, 2e-3, 1000))
    model = dataclasses.replace(model, denoiser=UNetDenoiser(model.denoiser.net, gentle, "epsilon"))
    before = {name: value.clone() for name, value in model.denoiser.net.state_dict().items()}
    trainer = stage(model, pool)
    losses = [float(trainer.update(step)["loss"]) for step in range(UPDATES)]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert all(torch.equal(before[name], value) for name, value in model.denoiser.net.state_dict().items())
    converted = UNetDenoiser(trainer.finish(), gentle, "v_prediction")
    x0, row = pool.draw(24, torch.Generator().manual_seed(7))
    t = torch.linspace(0, 999, 24).long()
    z = gentle.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(8)), t)
    for told in (trainer.condition(row), model.nothing().expand(24)):
        with torch.no_grad():
            goal, start = (
                model.denoiser(z, t, told),
                UNetDenoiser(model.denoiser.net, gentle, "v_prediction")(z, t, told),
            )
            assert distance(converted(z, t, told), goal) < 0.85 * distance(start, goal)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_dtypes_that_were_asked_for(teacher: tuple[Model, LatentPool], dtype: str) -> None:
    model, pool = teacher
    config = ProgressiveConfig.model_validate(
        {"stages": [{"steps": 4, "updates": 1}], "batch_size": 4, "teacher_dtype": dtype, "student_dtype": dtype}
    )
    begun = Run(model, pool, config, "shapes", Path(), Accelerator(cpu=True))
    frozen = begun.frozen(model.denoiser.net)
    told = model.nothing(), pool, ConvertConfig(updates=2), config, Accelerator(cpu=True)
    trainer = ConversionStage(GuidedDenoiser(frozen), *told, start=model.denoiser.net)
    assert torch.isfinite(torch.as_tensor(trainer.update(0)["loss"]))
    wanted = getattr(torch, dtype)
    for net, expected in ((frozen.net, wanted), (trainer.net, wanted), (trainer.finish(), torch.float32)):
        assert {p.dtype for p in net.parameters()} == {expected}
    assert {p.dtype for p in model.denoiser.net.parameters()} == {torch.float32}
    before, after = model.denoiser.net.state_dict(), trainer.finish().state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
