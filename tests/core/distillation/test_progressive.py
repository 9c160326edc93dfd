"""PD and DDIL on a tiny network: targets and their cost, the parts of a batch, and learning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, UNetDenoiser
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.parameterization import calibrate_reflection
from ddil_core.diffusion.schedule import CLEAN, timestep_grid, transitions
from ddil_core.diffusion.solvers import ddim
from ddil_core.distillation.aggregate import States
from ddil_core.distillation.config import ProgressiveConfig, StageConfig
from ddil_core.distillation.phases import DdilConfig, PhaseConfig
from ddil_core.distillation.progressive import ProgressiveStage, two_step_target
from ddil_core.distillation.sources import phase_at
from ddil_core.models.model import Model
from tests.core.closed_form import distance, rows
from tests.pipelines import BETAS

STEPS = 4
PAPER = (PhaseConfig(until=0.6, aggregated=0.25, p_teacher=0.85), PhaseConfig(until=1, aggregated=0.5, p_teacher=0.2))


def stage(
    model: Model,
    pool: LatentPool,
    updates: int = 20,
    guidance: float = 3.0,
    phases: tuple[PhaseConfig, ...] | None = PAPER,
    steps: int = STEPS,
    **options: int,
) -> ProgressiveStage:
    """2 · ``steps`` → ``steps`` with batches of 8; plain PD where ``phases`` is None; ``options`` go to the dataset."""
    ddil = None if phases is None else DdilConfig(**{"collect_every": 5, "capacity": 512, "phases": phases} | options)
    config = ProgressiveConfig(
        stages=(StageConfig(steps=steps, updates=updates),),
        batch_size=8,
        learning_rate=2e-3,
        warmup=5,
        ema_decay=0.9,
        ddil=ddil,
    )
    teacher = model.guided(guidance, calibrate_reflection(pool.mean.float()))
    return ProgressiveStage(teacher, pool, config.stages[0], config, Accelerator(cpu=True))


@contextmanager
def rows_through(network: nn.Module) -> Iterator[list[int]]:
    """The number of rows of each evaluation of a network."""
    seen: list[int] = []
    hook = network.register_forward_hook(lambda _, args, output: seen.append(len(output.sample)))
    try:
        yield seen
    finally:
        hook.remove()


def fresh_targets(trainer: ProgressiveStage, states: States) -> Tensor:
    """The teacher's two steps from states, computed one by one."""
    targets = []
    for one in states.split(1):
        t, middle, s = trainer.table[one.transition].unbind(1)
        with torch.no_grad():
            targets.append(two_step_target(trainer.teacher, one.z, t, middle, s, trainer.condition(one.row)))
    return torch.cat(targets)


def held(trainer: ProgressiveStage) -> States:
    """What the aggregated dataset holds, in the order of use."""
    dataset = trainer.source.dataset
    assert dataset is not None
    places = torch.tensor(dataset.queue)
    return States(dataset.z[places], dataset.target[places], dataset.transition[places], dataset.row[places])


def collected(trainer: ProgressiveStage, p_teacher: float, wanted: int) -> None:
    trainer.source.collect(p_teacher, wanted, batch=0)


def test_the_student_starts_as_a_copy_of_the_teacher(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool)
    theirs = model.denoiser.net.state_dict()
    for held in (trainer.net, trainer.ema.module):
        ours = held.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert not {p.data_ptr() for p in held.parameters()} & {p.data_ptr() for p in model.denoiser.net.parameters()}
    before = {name: value.clone() for name, value in theirs.items()}
    trainer.update(0)
    assert all(torch.equal(before[name], value) for name, value in model.denoiser.net.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in trainer.net.state_dict().items())
    assert trainer.finish() is trainer.ema.module


def test_the_table_holds_the_two_steps_of_every_transition(model: Model, pool: LatentPool) -> None:
    assert stage(model, pool).table.tolist() == [[999, 874, 749], [749, 624, 500], [500, 375, 250], [250, 125, CLEAN]]


@pytest.mark.parametrize("p_teacher", [1.0, 0.5, 0.0])
def test_the_target_of_a_visited_state_is_the_teachers_two_steps_from_it(
    model: Model, pool: LatentPool, p_teacher: float
) -> None:
    trainer = stage(model, pool)
    collected(trainer, p_teacher, 24)
    dataset = trainer.source.dataset
    assert dataset is not None
    assert dataset.collected == 24  # six trajectories of four states
    assert sorted(held(trainer).transition.tolist()) == sorted(list(range(STEPS)) * 6)
    states = held(trainer)
    for target, fresh in zip(states.target, fresh_targets(trainer, states), strict=True):
        assert distance(target, fresh) < 1e-5


def test_a_trajectory_starts_at_noise_and_goes_where_its_actor_takes_it(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool)
    collected(trainer, 0.0, 24)
    dataset = trainer.source.dataset
    assert dataset is not None
    states = {k: dataset.z[[p for p in dataset.queue if dataset.transition[p] == k]] for k in range(STEPS)}
    assert abs(float(states[0].var()) - 1) < 0.1
    condition = trainer.condition(dataset.row[[p for p in dataset.queue if dataset.transition[p] == 0]])
    z = states[0]
    with torch.no_grad():
        x0 = trainer.student(z, rows(999, z), condition)
        after, _ = ddim(trainer.schedule, z, rows(999, z), rows(749, z), x0)
    nearest = torch.cdist(after.flatten(1), states[1].flatten(1)).min(1).values
    assert float(nearest.max()) < 1e-3 * float(after.flatten(1).norm(dim=1).mean())


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_target_is_computed_once(model: Model, pool: LatentPool, uses: int, guidance: float) -> None:
    trainer = stage(model, pool, guidance=guidance, uses=uses)
    dataset = trainer.source.dataset
    assert dataset is not None
    data = 0
    with rows_through(trainer.teacher.network.net) as seen:
        for step in range(20):
            trainer.update(step)
            data += 6 if step < 12 else 4
    # Two evaluations a target, twice as many with guidance: one target for each row of data and each state.
    assert sum(seen) == 2 * trainer.teacher.nfe * (data + dataset.collected)


@pytest.mark.parametrize("p_teacher", [1.0, 0.5, 0.0])
def test_the_student_walks_where_it_acts_and_not_past_the_last_state(
    model: Model, pool: LatentPool, p_teacher: float
) -> None:
    trainer = stage(model, pool)
    with rows_through(trainer.net) as seen:
        collected(trainer, p_teacher, 400)
    walks = 100 * (STEPS - 1)
    expected = (1 - p_teacher) * walks
    assert abs(sum(seen) - expected) <= 3.5 * (walks * p_teacher * (1 - p_teacher)) ** 0.5


@pytest.mark.parametrize("phases", [None, PAPER], ids=["PD", "DDIL"])
def test_a_student_of_one_step_trains_at_pure_noise_alone(
    model: Model, pool: LatentPool, phases: tuple[PhaseConfig, ...] | None
) -> None:
    trainer = stage(model, pool, phases=phases, steps=1)
    assert trainer.table.tolist() == [[999, 500, -1]]
    for step in range(8):
        assert bool(torch.as_tensor(trainer.update(step)["loss"]).isfinite().all())
    if phases is not None:
        with rows_through(trainer.net) as seen:
            collected(trainer, 0.5, 40)
        assert not seen and not held(trainer).transition.any()  # the student's only step is never taken


def test_the_second_use_asks_the_teacher_for_nothing(model: Model, pool: LatentPool) -> None:
    everything = (PhaseConfig(until=1, aggregated=1.0, p_teacher=0.0),)
    trainer = stage(model, pool, updates=8, phases=everything, uses=2, collect_every=8)  # 32 states, each used twice
    with rows_through(trainer.teacher.network.net) as seen:
        for step in range(8):
            trainer.update(step)
    assert sum(seen) == 32 * 2 * 2


@pytest.mark.parametrize("phases", [None, PAPER], ids=["PD", "DDIL"])
def test_a_batch_is_trained_on_its_own_targets(
    model: Model, pool: LatentPool, phases: tuple[PhaseConfig, ...] | None
) -> None:
    """Also across the ends of what was labelled together, and of a phase."""
    trainer = stage(model, pool, phases=phases, uses=2)
    for step in range(16):
        states, aggregated = trainer.source.draw(step)
        assert (len(states.z), aggregated) == (8, 0 if phases is None else 2 if step < 12 else 4)
        for target, fresh in zip(states.target, fresh_targets(trainer, states), strict=True):
            assert distance(target, fresh) < 1e-5


@pytest.mark.parametrize("reflected", [False, True])
def test_an_updates_loss_is_numpys(model: Model, pool: LatentPool, reflected: bool) -> None:
    """The guided teacher's two steps, its x̂ clipped or not, and the student's, which never is;

    networks alone are torch's.
    """
    trainer = stage(model, pool, phases=None)
    bound = trainer.teacher.reflection
    assert bound is not None
    if not reflected:
        trainer.teacher.reflection = None
    states, _ = trainer.source.draw(0)
    squares = np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2)
    squares = np.append(squares, 1.0)  # where a trajectory ends clean
    times = trainer.table[states.transition].numpy()
    times[times == CLEAN] = 1000
    (a, o), (a_m, o_m), (a_s, o_s) = (
        [np.sqrt(part[column])[:, None, None, None] for part in (squares, 1 - squares)] for column in times.T
    )
    text = trainer.condition(states.row).tensors["encoder_hidden_states"]
    nothing = model.nothing().tensors["encoder_hidden_states"].expand(8, -1, -1)
    low, high = ((bound.centre + sign * bound.bound).numpy()[None, :, None, None] for sign in (-1, 1))

    def v(z: np.ndarray, t: np.ndarray, told: Tensor) -> np.ndarray:
        with torch.no_grad():
            return model.denoiser.net(torch.from_numpy(z).float(), torch.from_numpy(t), told).sample.double().numpy()

    def x0(z: np.ndarray, t: np.ndarray, a: np.ndarray, o: np.ndarray) -> np.ndarray:
        v_c, v_0 = v(z, t, text), v(z, t, nothing)
        found = a * z - o * (v_0 + 3 * (v_c - v_0))
        return np.clip(found, low, high) if reflected else found

    z = states.z.double().numpy()
    first = x0(z, times[:, 0], a, o)
    middle = a_m * first + o_m * (z - a * first) / o
    second = x0(middle, times[:, 1], a_m, o_m)
    end = a_s * second + o_s * (middle - a_m * second) / o_m
    target = (end - o_s / o * z) / (a_s - o_s / o * a)
    drawn = a * z - o * v(z, times[:, 0], text)  # the student is still the teacher's network
    errors = np.square(drawn - target).reshape(8, -1).mean(1)
    signal = squares[times[:, 0]]
    expected = (np.maximum(1, signal / (1 - signal)) * errors).mean()
    assert float(trainer.update(0)["loss"]) == pytest.approx(expected, rel=1e-3)


def test_what_is_labelled_together_does_not_change_a_batch(model: Model, pool: LatentPool) -> None:
    drawn = {}
    for size in (1, 16, 64):
        trainer = stage(model, pool, phases=None)
        trainer.context.config = trainer.config.model_copy(update={"teacher_batch_size": size})
        drawn[size] = [trainer.source.draw(step)[0] for step in range(5)]
    for size in (16, 64):
        for a, b in zip(drawn[1], drawn[size], strict=True):
            assert torch.equal(a.z, b.z)
            assert torch.equal(a.row, b.row)
            assert distance(a.target, b.target) < 1e-5


def test_forward_diffused_states_are_at_the_times_of_the_grid(model: Model, pool: LatentPool) -> None:
    trainer = stage(model, pool, updates=60, phases=None)
    assert trainer.source.dataset is None
    draws = [trainer.source.draw(step)[0] for step in range(60)]
    transition = torch.cat([states.transition for states in draws])
    counts = torch.bincount(transition, minlength=STEPS)
    assert bool((abs(counts - 120) < 40).all())  # uniform: σ = 9.5
    z, row = torch.cat([states.z for states in draws]), torch.cat([states.row for states in draws])
    alpha, sigma = trainer.schedule.at(trainer.table[transition, 0], z)
    noise = (z - alpha * pool.mean[row].float()) / (sigma**2 + (alpha * pool.std[row].float()) ** 2).sqrt()
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.01


@pytest.mark.parametrize("uses", [1, 2])
def test_a_stage_uses_what_it_collects_in_the_shares_of_its_phases(model: Model, pool: LatentPool, uses: int) -> None:
    trainer = stage(model, pool, updates=40, uses=uses, collect_every=10)
    dataset = trainer.source.dataset
    assert dataset is not None
    walked = {0: [0, 0], 1: [0, 0]}  # for each phase: states, and those from which the student walked on
    phase, add = 0, dataset.add

    def counted(states: States) -> list[int]:
        walked[phase][0] += int((states.transition < STEPS - 1).sum())
        return add(states)

    dataset.add = counted  # type: ignore[method-assign]
    student = trainer.student
    for step in range(40):
        phase = 0 if step < 24 else 1
        with rows_through(student.net) as seen:
            assert trainer.update(step)["aggregated_fraction"] == (0.25, 0.5)[phase]
        walked[phase][1] += sum(seen) - trainer.config.batch_size
    assert dataset.used >= 0.95 * dataset.collected
    assert dataset.collected <= (24 * 2 + 16 * 4) / uses + 2 * STEPS
    for number, p in enumerate((0.15, 0.8)):
        states, by_student = walked[number]
        assert abs(by_student / states - p) < 3.5 * (p * (1 - p) / states) ** 0.5  # at its own rate, within chance


def test_phases_end_where_they_say() -> None:
    assert [phase_at(PAPER, step, 10)[1:] for step in (0, 5, 6, 9)] == [(0, 6), (0, 6), (6, 10), (6, 10)]
    assert phase_at(PAPER, 6, 10)[0].p_teacher == 0.2
    with pytest.raises(IndexError, match=r"batch 10 is past the stage's 10$"):
        phase_at(PAPER, 10, 10)


def test_every_update_has_its_own_randomness(model: Model, pool: LatentPool) -> None:
    for seed in (0, 2024, 2**40):
        trainer = stage(model, pool, phases=None)
        trainer.context.config = trainer.config.model_copy(update={"seed": seed})
        seeds = {trainer.generator(step, purpose).initial_seed() for step in range(500) for purpose in (0, 1)}
        assert len(seeds) == 1000


def endpoint(denoiser: GuidedDenoiser, z: Tensor, condition: Condition, steps: int) -> Tensor:
    with torch.no_grad():
        for t, s in transitions(timestep_grid(steps)):
            z, _ = ddim(denoiser.schedule, z, rows(t, z), rows(s, z), denoiser(z, rows(t, z), condition))
    return z


@pytest.mark.parametrize("phases", [None, PAPER], ids=["PD", "DDIL"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_student_learns_what_its_teacher_does_in_twice_the_steps(
    model: Model, pool: LatentPool, guidance: float, phases: tuple[PhaseConfig, ...] | None
) -> None:
    trainer = stage(model, pool, updates=80, guidance=guidance, phases=phases)
    trainer.config = trainer.config.model_copy(update={"learning_rate": 5e-4})
    trainer.teacher.reflection = None  # an untrained network has most of its x̂ outside of the data's range
    losses = [float(trainer.update(step)["loss"]) for step in range(80)]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])
    average = UNetDenoiser(trainer.finish(), trainer.schedule, "v_prediction")
    prompts = open_data("shapes").prompts(16)  # neither these captions nor this noise were trained on
    z = initial_noise([Sample(prompt.id) for prompt in prompts], model.latent_shape, seed=0)
    condition = model.encode([prompt.text for prompt in prompts])
    goal = endpoint(trainer.teacher, z, condition, 2 * STEPS)
    # What it started from; without guidance that is the undistilled teacher at the student's own number of steps.
    untaught = endpoint(GuidedDenoiser(model.denoiser), z, condition, STEPS)
    taught = endpoint(GuidedDenoiser(average), z, condition, STEPS)
    assert distance(taught, goal) < 0.85 * distance(untaught, goal)
