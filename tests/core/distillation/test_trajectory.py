"""TCD: an update's loss equals the paper's formula in NumPy; s is drawn as it should be; CTM's condition; whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, TCDScheduler

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import END, Condition, GuidedDenoiser, UNetDenoiser, guidance_embedding
from ddil_core.diffusion.integrate import integrate
from ddil_core.diffusion.parameterization import calibrate_reflection
from ddil_core.diffusion.rollout import STUDENT
from ddil_core.distillation.collectors import SeparateCollector
from ddil_core.distillation.distill import distill
from ddil_core.distillation.trajectory import (
    TrajectoryConfig,
    TrajectoryStage,
    require_trajectory,
    trajectory_network,
    with_end,
)
from ddil_core.models.model import Model, load_model
from ddil_core.models.turns import take_turns
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance, normal
from tests.core.distillation.kills import killed_after, same_weights
from tests.pipelines import BETAS, save_pipeline

PHASES = [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]
DDIL = {"uses": 2, "collect_every": 3, "capacity": 512, "phases": PHASES}
RUN = {"method": "tcd", "batch_size": 4, "pool": 12, "warmup": 2, "save_every": 2, "learning_rate": 1e-3, "updates": 4}
RUNS: dict[str, dict[str, Any]] = {
    "tcd": {"w_embedding": 16},
    "ctm": {"w_embedding": 16, "ddil": DDIL, "condition_on_s": True, "gamma": 0.5},
    "tcd-lora": {"lora": {"rank": 4, "alpha": 8}, "ddil": DDIL, "teacher_steps": 20},
}


def stage(model: Model, pool: LatentPool, ddil: bool = False, **more: object) -> TrajectoryStage:
    told = {"collect_every": 4, "capacity": 512, "phases": PHASES}
    base = {"updates": 8, "batch_size": 8, "warmup": 2, "w_embedding": 16, "ddil": told if ddil else None}
    config = TrajectoryConfig.model_validate(base | more)
    teacher = GuidedDenoiser(model.denoiser, model.nothing(), reflection=calibrate_reflection(pool.mean.float()))
    start = trajectory_network(model.denoiser.net, config)
    return TrajectoryStage(teacher, pool, config, Accelerator(cpu=True), start)


def test_s_is_uniform_over_the_ends_of_the_steps_to_come(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool, teacher_steps=5)
    assert trainer.table.tolist() == [[999, 799], [799, 599], [599, 399], [399, 199], [199, 0]]
    for transition in range(5):
        drawn = torch.cat([trainer.draw_ends(torch.full((500,), transition), step) for step in range(4)])
        values, counts = drawn.unique(return_counts=True)
        assert values.tolist() == [0, 199, 399, 599, 799][: 5 - transition]
        expected = 2000 / len(values)
        assert float(((counts - expected).abs() / expected**0.5).max()) < 4
    again = torch.full((9,), 2)
    assert torch.equal(trainer.draw_ends(again, 3), trainer.draw_ends(again, 3))


@pytest.mark.parametrize("told", [False, True], ids=["tcd", "ctm"])
def test_an_updates_loss_is_the_papers(told: bool, model: Model, pool: LatentPool) -> None:
    """The jump as the paper writes it, by λ = log(α/σ): z_s = σ_s/σ_t z_t − α_s (e^(λ_t − λ_s) − 1) x̂."""
    trainer = stage(model, pool, condition_on_s=told, loss="l2")
    if told:  # an embedding that matters
        with torch.no_grad():
            for net in (trainer.net, trainer.target_net.net):
                net.class_embedding.linear_2.weight.copy_(normal(*net.class_embedding.linear_2.weight.shape))
    states, _ = trainer.source.draw(0)
    assert states.guidance is not None
    t, middle = trainer.table[states.transition].unbind(1)
    s = trainer.draw_ends(states.transition, 0)
    assert bool((s <= middle).all()) and len(set(s.tolist())) > 1
    squares = np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2)

    def levels(time: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        square = squares[time.numpy()][:, None, None, None]
        return np.sqrt(square), np.sqrt(1 - square)

    text = trainer.condition(states.row).tensors["encoder_hidden_states"]
    extra: dict[str, torch.Tensor] = {"class_labels": s} if told else {}
    bound = trainer.teacher.reflection
    assert bound is not None
    low, high = ((bound.centre + sign * bound.bound).numpy()[None, :, None, None] for sign in (-1, 1))

    def jump(net: Any, z: np.ndarray, time: torch.Tensor, clip: bool) -> np.ndarray:
        embedded = guidance_embedding(states.guidance - 1, 16)  # type: ignore[operator]
        with torch.no_grad():
            v = net(torch.from_numpy(z).float(), time, text, timestep_cond=embedded, **extra).sample.numpy()
        (alpha, sigma), (alpha_s, sigma_s) = levels(time), levels(s)
        x0 = alpha * z - sigma * v
        x0 = np.clip(x0, low, high) if clip else x0
        h = np.log(alpha_s / sigma_s) - np.log(alpha / sigma)
        return sigma_s / sigma * z - alpha_s * np.expm1(-h) * x0

    target = jump(trainer.target_net.net, states.target.numpy().astype(np.float64), middle, clip=True)
    at_end = (s == middle).numpy()
    if at_end.any():
        np.testing.assert_allclose(target[at_end], states.target.numpy()[at_end], rtol=1e-5, atol=1e-6)
    value = jump(trainer.net, states.z.numpy().astype(np.float64), t, clip=False)
    assert float(trainer.update(0)["loss"]) == pytest.approx(((value - target) ** 2).mean(), rel=2e-4)


def test_a_student_that_is_told_s_starts_as_its_teacher_and_learns_s(model: Model, pool: LatentPool) -> None:
    net: Any = with_end(model.denoiser.net)
    z, t = normal(4, *model.latent_shape), torch.tensor([19, 259, 759, 999])
    text = model.encode(["a small red circle"]).tensors["encoder_hidden_states"].expand(4, -1, -1)
    for s in (0, 999):
        told = net(z, t, text, class_labels=torch.full((4,), s)).sample
        assert torch.equal(told, model.denoiser.net(z, t, text).sample)
    trainer = stage(model, pool, condition_on_s=True, learning_rate=1e-2)
    for step in range(3):
        trainer.update(step)
    condition = trainer.student_condition(torch.zeros(4, dtype=torch.long), torch.full((4,), 8.0))
    with torch.no_grad():
        near, far, unsaid = (
            trainer.student(z, t, told)
            for told in (
                condition.ending_at(torch.full((4,), 0)),
                condition.ending_at(torch.full((4,), 900)),
                condition,
            )
        )
    assert distance(near, far) > 1e-4 and torch.equal(near, unsaid)


def test_times_of_a_condition_are_not_rounded(model: Model) -> None:
    net: Any = with_end(model.denoiser.net).to(torch.bfloat16)
    denoiser = UNetDenoiser(net, model.denoiser.schedule, "v_prediction")
    inputs = denoiser.cast(Condition({"text": normal(1, 3)}).ending_at(torch.tensor([999])))
    assert denoiser.reads_end and not model.denoiser.reads_end
    assert inputs.tensors[END].tolist() == [999] and inputs.tensors["text"].dtype == torch.bfloat16


def test_rollouts_are_the_students_own_sampling(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool, ddil=True, gamma=0.5)
    collector = trainer.source.collector
    assert isinstance(collector, SeparateCollector)
    sole = collector.actors[STUDENT]
    assert [int(trainer.table[place, 0]) for place in sole.transitions] == [999, 759, 499, 259]
    assert sole.condition is not None
    actor, z, noise = sole.actor, normal(2, *model.latent_shape), normal(2, 3, *model.latent_shape, seed=1)
    condition = sole.condition(torch.tensor([0, 1]), torch.tensor([7.0, 9.0]))
    noisy = Condition(condition.tensors, noise=noise)
    scheduler = TCDScheduler(**BETAS, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    ours = theirs = z
    with torch.no_grad():
        for place, t in enumerate(scheduler.timesteps[:3]):
            ours = actor.act(place, ours, noisy)
            v = trainer.student.output(theirs, t.expand(2), condition)
            jumped = scheduler.step(v, t, theirs, eta=0.5, generator=torch.Generator()).pred_noised_sample
            s = scheduler.timesteps[place + 1]
            kept = scheduler.alphas_cumprod[s] / scheduler.alphas_cumprod[s // 2]
            theirs = kept.sqrt() * jumped + (1 - kept).sqrt() * noise[:, place]
            assert distance(ours, theirs) < 1e-5


@pytest.fixture(scope="module", params=list(RUNS))
def finished(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("tcd") / request.param
    go(folder, out, request.param)
    return request.param, out


def go(teacher: Path, out: Path, name: str) -> None:
    distill(str(teacher), "shapes", RUN | RUNS[name], out, device="cpu")


@pytest.mark.parametrize("finished", ["ctm", "tcd-lora"], indirect=True)
def test_a_killed_run_ends_with_the_same_weights(folder: Path, finished: tuple[str, Path], tmp_path: Path) -> None:
    name, whole = finished
    with killed_after(TrajectoryStage, 2):
        go(folder, tmp_path / "killed", name)
    go(folder, tmp_path / "killed", name)
    assert same_weights("unet/diffusion_pytorch_model.safetensors", tmp_path / "killed", whole)


def test_stock_diffusers_draws_what_our_sampler_draws(finished: tuple[str, Path]) -> None:
    """All steps, with the same noise between them. A student that is told s is refused by stock pipelines."""
    name, out = finished
    student, text = load_model(str(out)), "a small red circle"
    told = json.loads((out / "student" / "ddil.json").read_text())
    gamma = 0.5 if name == "ctm" else 0.3
    assert (told["solver"], told["gamma"], told["ends_clean"]) == ("tcd", gamma, False)
    assert told["grid"] == ([999, 749, 499, 249] if name == "tcd-lora" else [999, 759, 499, 259])
    assert student.sampling.effective()["solver"] == f"tcd (gamma {gamma:g})"
    pipeline = DiffusionPipeline.from_pretrained(out / "student")
    assert isinstance(pipeline.scheduler, TCDScheduler)
    pipeline.set_progress_bar_config(disable=True)
    z, scale = normal(1, *student.latent_shape), student.sampling.guidance_scale
    options = {"guidance_scale": scale, "latents": z, "output_type": "latent", "num_inference_steps": 4, "eta": gamma}
    if name == "ctm":
        with pytest.raises(ValueError, match="class_labels should be provided"):
            pipeline(text, **options)
        return
    theirs = pipeline(text, generator=torch.Generator().manual_seed(3), **options).images
    generator = torch.Generator().manual_seed(3)
    ours = integrate(
        student.guided(scale),
        student.sampling.own_solver(),
        z,
        student.encode([text]),
        student.sampling.transitions(student.denoiser.schedule),
        noise=lambda step: torch.randn(z.shape, generator=generator),
    )
    assert distance(theirs, ours) < 1e-5


def test_a_student_can_take_turns_with_its_teacher(folder: Path, finished: tuple[str, Path]) -> None:
    name, out = finished
    teacher, student = load_model(str(folder)), load_model(str(out))
    actors, grid = take_turns(teacher, student, 8)
    z = normal(1, *student.latent_shape)
    condition = student.encode(["a small red circle"])
    with torch.no_grad():
        after = actors[STUDENT].act(1, z, condition)
        if name == "ctm":  # the network is told that its jump ends at the end of the transition
            told = condition.ending_at(torch.tensor([grid[2]]))
            t, s = (torch.tensor([grid[place]]) for place in (1, 2))
            x0 = actors[STUDENT].denoiser(z, t, told)
            assert torch.equal(
                after, actors[STUDENT].solver.step(student.denoiser.schedule, z, t, s, x0, None, None)[0]
            )
    assert grid == [999, 749, 500, 250] and bool(torch.isfinite(after).all())


@pytest.mark.parametrize("finished", ["tcd-lora"], indirect=True)
def test_a_lora_goes_onto_the_teachers_own_pipeline(folder: Path, finished: tuple[str, Path]) -> None:
    _, out = finished
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(out / "student")
    whole = DiffusionPipeline.from_pretrained(out / "student").unet
    z, t, text = normal(2, *load_model(str(folder)).latent_shape), torch.tensor([999, 249]), normal(2, 20, 16)
    with torch.no_grad():
        assert distance(pipeline.unet(z, t, text).sample, whole(z, t, text).sample) < 1e-5


def test_what_does_not_fit_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a LoRA has no embedding of s; leave out condition_on_s, or the LoRA"):
        TrajectoryConfig.model_validate({"updates": 1, "lora": {}, "condition_on_s": True})
    flow = load_model(str(save_pipeline(tmp_path, None, seed=1, layout="StableDiffusion3Pipeline")))
    with pytest.raises(DdilError, match="needs a network that predicts ε, v or x₀; distil a flow by pd"):
        require_trajectory(flow, TrajectoryConfig(updates=1))
    points = load_model("gaussians")
    with pytest.raises(WrongCommand, match="condition_on_s adds an embedding to a U-Net without classes"):
        require_trajectory(points, TrajectoryConfig(updates=1, condition_on_s=True))
