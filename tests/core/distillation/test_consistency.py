"""LCM: the grid and the scalings equal diffusers'. An update's loss equals NumPy's. Target and rollouts are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, guidance_embedding
from ddil_core.diffusion.parameterization import boundary_scalings, calibrate_reflection
from ddil_core.diffusion.rollout import STUDENT, TEACHER
from ddil_core.distillation.collectors import SeparateCollector, TransitionBatch
from ddil_core.distillation.consistency import (
    ConsistencyStage,
    require_consistency,
    student_network,
    with_embedding,
)
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.losses import consistency_loss
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import distance, normal
from tests.pipelines import BETAS

PHASES = [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]
LORA = {"lora": {"rank": 4, "alpha": 4}, "w_embedding": None}


def stage(
    model: Model, pool: LatentPool, reflection: str = "clamp", ddil: bool = False, **more: object
) -> ConsistencyStage:
    told = {"collect_every": 4, "capacity": 512, "phases": PHASES}
    base = {"updates": 8, "batch_size": 8, "warmup": 2, "w_embedding": 16, "ddil": told if ddil else None}
    config = ConsistencyConfig.model_validate(base | more)
    bound = calibrate_reflection(pool.mean.float(), reflection)  # type: ignore[arg-type]
    teacher = GuidedDenoiser(model.denoiser, model.nothing(), reflection=bound)
    start = student_network(model.denoiser.net, config)
    return ConsistencyStage(teacher, pool, config, Accelerator(cpu=True), start)


def test_grid_and_scalings_are_those_of_diffusers(model: Model, pool: LatentPool) -> None:
    table = stage(model, pool).table.tolist()
    scheduler = LCMScheduler(**BETAS)
    scheduler.set_timesteps(50)
    assert [t for t, _ in table] == scheduler.timesteps.tolist() == list(range(999, 0, -20))
    assert all(t - s == 20 for t, s in table[:-1]) and table[-1] == [19, 0]  # ᾱ₀, not clean
    for t in (0, 19, 259, 999):
        ours = boundary_scalings(torch.tensor([t]), torch.zeros(1, 1, dtype=torch.float64))
        np.testing.assert_allclose(
            [float(c) for c in ours], scheduler.get_scalings_for_boundary_condition_discrete(t), rtol=1e-9
        )
    assert [float(c) for c in boundary_scalings(torch.tensor([0]), torch.zeros(1, 1))] == [1, 0]


def test_a_coarser_grid_is_that_of_diffusers_too(model: Model, pool: LatentPool) -> None:
    coarse = stage(model, pool, teacher_steps=20, student_steps=3)
    scheduler = LCMScheduler(**BETAS, original_inference_steps=20)
    scheduler.set_timesteps(20)
    assert coarse.table[:, 0].tolist() == scheduler.timesteps.tolist() == list(range(999, 0, -50))
    scheduler.set_timesteps(3)
    assert coarse.sampling is not None
    assert coarse.sampling.times(model.denoiser.schedule) == scheduler.timesteps.tolist() == [999, 699, 349]
    collector = coarse.source.collector
    assert isinstance(collector, SeparateCollector)
    visited = collector.actors[STUDENT].transitions
    assert [int(coarse.table[place, 0]) for place in visited] == [999, 699, 349]


def test_a_grid_that_the_schedule_does_not_have_is_refused(model: Model) -> None:
    sentence = "^teacher_steps must divide the teacher's 1000 timesteps, and 30 does not; choose another$"
    with pytest.raises(WrongCommand, match=sentence):
        require_consistency(model, ConsistencyConfig(updates=1, teacher_steps=30))
    with pytest.raises(ValueError, match="student_steps is at most teacher_steps, 2, and not 4"):
        ConsistencyConfig(updates=1, teacher_steps=2)


def test_loss_is_pseudo_huber_or_squared() -> None:
    a, b = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    d = a.double().numpy() - b.double().numpy()
    assert float(consistency_loss(a, b)) == pytest.approx((np.sqrt(d**2 + 1e-6) - 1e-3).mean(), rel=1e-5)
    assert float(consistency_loss(a, b, None)) == pytest.approx((d**2).mean(), rel=1e-5)
    weight = np.array([1.0, 0.5, 8.0])
    weighted = float(consistency_loss(a, b, None, torch.from_numpy(weight)))
    assert weighted == pytest.approx((weight[:, None, None, None] * d**2).mean(), rel=1e-5)


@pytest.mark.parametrize(("reflection", "weighting"), [("none", "none"), ("clamp", "none"), ("clamp", "v")])
def test_an_updates_loss_is_numpys(model: Model, pool: LatentPool, reflection: str, weighting: str) -> None:
    """Guidance as LCM writes it, ε_c + w (ε_c − ε_∅) with w = g − 1;

    only the networks' outputs are taken from torch.
    """
    trainer = stage(model, pool, reflection, weighting=weighting)
    states, _ = trainer.source.draw(0)
    g = states.guidance
    assert g is not None and 6 <= float(g.min()) < float(g.max()) <= 16
    squares = np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2)
    t = trainer.table[states.transition, 0]
    s = trainer.table[states.transition, 1]
    levels = {
        time: (np.sqrt(squares[at])[:, None, None, None], np.sqrt(1 - squares[at])[:, None, None, None])
        for time, at in (("t", t.numpy()), ("s", s.numpy()))
    }
    text = trainer.condition(states.row).tensors["encoder_hidden_states"]
    nothing = model.nothing().tensors["encoder_hidden_states"].expand(8, -1, -1)
    net, z = model.denoiser.net, states.z.numpy().astype(np.float64)
    (alpha, sigma), (alpha_s, sigma_s) = levels["t"], levels["s"]
    with torch.no_grad():
        v_c, v_0 = (net(states.z, t, told).sample.numpy().astype(np.float64) for told in (text, nothing))
    eps_c, eps_0 = sigma * z + alpha * v_c, sigma * z + alpha * v_0
    w = (g.numpy().astype(np.float64) - 1)[:, None, None, None]
    x0 = (z - sigma * (eps_c + w * (eps_c - eps_0))) / alpha
    bound = trainer.teacher.reflection
    assert bound is not None
    low, high = ((bound.centre + sign * bound.bound).numpy()[None, :, None, None] for sign in (-1, 1))
    reflect = (lambda x: np.clip(x, low, high)) if reflection == "clamp" else (lambda x: x)
    x0 = reflect(x0)
    z_s = alpha_s * x0 + sigma_s * (z - alpha * x0) / sigma
    told = guidance_embedding(g - 1, 16)
    target_net, student_net = trainer.target_net.net, trainer.net
    with torch.no_grad():
        v_s = target_net(torch.from_numpy(z_s).float(), s, text, timestep_cond=told).sample.numpy()
        v_t = student_net(states.z, t, text, timestep_cond=told).sample.numpy()

    def value(x0: np.ndarray, z: np.ndarray, time: np.ndarray) -> np.ndarray:
        scaled = 10.0 * time[:, None, None, None]
        return 0.25 / (scaled**2 + 0.25) * z + scaled / np.sqrt(scaled**2 + 0.25) * x0

    target = value(reflect(alpha_s * z_s - sigma_s * v_s), z_s, s.numpy())
    drawn = value(alpha * z - sigma * v_t, z, t.numpy())
    weight = 1 / sigma if weighting == "v" else 1.0
    expected = (weight * (np.sqrt((drawn - target) ** 2 + 1e-6) - 1e-3)).mean()
    assert float(trainer.update(0)["loss"]) == pytest.approx(expected, rel=2e-4)


def test_the_student_starts_as_the_teacher_whatever_it_is_told(model: Model) -> None:
    net = with_embedding(model.denoiser.net, 256)
    z, t = normal(4, *model.latent_shape), torch.tensor([19, 259, 759, 999])
    text = model.encode(["a small red circle"]).tensors["encoder_hidden_states"].expand(4, -1, -1)
    told = guidance_embedding(torch.tensor([5.0, 7.5, 10.0, 15.0]), 256)
    with torch.no_grad():
        assert torch.equal(net(z, t, text, timestep_cond=told).sample, model.denoiser.net(z, t, text).sample)
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([5.0, 7.5, 10.0, 15.0]), 256)
    torch.testing.assert_close(told, theirs, rtol=0, atol=1e-3)  # sines of up to 15,000 in float32


def test_a_network_whose_configuration_leaves_the_embedding_out_gets_one(model: Model) -> None:
    """Stable Diffusion 1.5's does. diffusers lists what it fills in, and ignores new values of what it lists."""
    config = dict(model.denoiser.net.config)
    del config["time_cond_proj_dim"]
    net = UNet2DConditionModel.from_config(config)
    assert "time_cond_proj_dim" in net.config["_use_default_values"]
    wider = with_embedding(net, 16)
    assert wider.config.time_cond_proj_dim == 16 and wider.time_embedding.cond_proj.weight.shape[1] == 16
    assert wider.config.block_out_channels == net.config.block_out_channels


def test_the_target_is_the_average_and_a_lora_its_own(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool)
    before = [p.detach().clone() for p in trainer.ema.module.parameters()]
    trainer.update(0)
    for old, average, weight in zip(before, trainer.ema.module.parameters(), trainer.net.parameters(), strict=True):
        torch.testing.assert_close(average, 0.95 * old + 0.05 * weight.detach(), rtol=1e-4, atol=1e-7)
    assert trainer.target_net.net is trainer.ema.module
    lora = stage(model, pool, **LORA)
    assert lora.ema is None and lora.target_net.net is lora.net
    before = {name: p.detach().clone() for name, p in lora.net.named_parameters()}
    for step in range(3):
        lora.update(step)
    changed = {name for name, p in lora.net.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert set(lora.stateful()["net"].state_dict()) == {name for name in before if "lora_" in name}


def test_a_collected_pair_is_the_teachers_step_at_the_states_own_guidance(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool, ddil=True)
    dataset = trainer.source.dataset
    assert dataset is not None
    actors: list[str] = []
    label = trainer.labeler.label_transitions

    def counted(batch: TransitionBatch) -> Tensor:
        actors.extend([batch.actor] * len(batch.row))
        return label(batch)

    trainer.labeler.label_transitions = counted  # type: ignore[method-assign]
    trainer.source.collect(0.5, 80, batch=0)
    assert dataset.collected >= 80
    assert actors.count(TEACHER) % 50 == 0 and actors.count(STUDENT) % 4 == 0
    places = torch.tensor(sorted(dataset.queue))
    assert dataset.guidance is not None
    fresh = trainer.labeler.label(
        dataset.z[places], dataset.transition[places], dataset.row[places], dataset.guidance[places]
    )
    assert distance(dataset.target[places], fresh) < 1e-5
    assert {999, 759, 499, 259} <= set(trainer.times[dataset.transition[places]].tolist())
    assert float(dataset.guidance[places].min()) >= 6


def test_guidance_by_row_is_guidance(model: Model, pool: LatentPool) -> None:
    denoiser = GuidedDenoiser(model.denoiser, model.nothing())
    z, t = normal(2, *model.latent_shape), torch.tensor([999, 259])
    told = model.encode(["a small red circle", "a large blue star"])
    both = denoiser(z, t, Condition(told.tensors, guidance=torch.tensor([2.0, 8.0])))
    for row, scale in enumerate((2.0, 8.0)):
        assert distance(both[row : row + 1], model.guided(scale)(z, t, told)[row : row + 1]) < 1e-5


def test_a_batch_in_parts_and_recomputed_activations_are_the_same_update(model: Model, pool: LatentPool) -> None:
    trainers = [stage(model, pool), stage(model, pool, gradient_accumulation=4, gradient_checkpointing=True)]
    losses = [[float(trainer.update(step)["loss"]) for step in range(3)] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    a, b = (torch.cat([p.detach().flatten() for p in trainer.net.parameters()]) for trainer in trainers)
    assert distance(a, b) < 1e-4  # Adam divides rounding of tiny gradients by itself


def test_the_student_learns_to_be_consistent(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool, "none", loss="l2", updates=30, learning_rate=2e-3)
    losses = [float(trainer.update(step)["loss"]) for step in range(30)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
